"""What an alert may set going, always behind a guard."""
