"""Where events go: log, Kafka, Grafana, webhooks."""
