"""The YAML file: its schema, its problems, and the components that it names."""
