#!/bin/sh
# Makes the topics that oodmon writes to; what exists is left as it is.
# BOOTSTRAP=host:port REPLICAS=3 PARTITIONS=6 sh create-topics.sh
set -eu
bin="${KAFKA_BIN:-/opt/kafka/bin}"
bootstrap="${BOOTSTRAP:-localhost:9092}"
replicas="${REPLICAS:-3}"
partitions="${PARTITIONS:-6}"
# With three replicas a write waits for two, so that the loss of one machine loses no alert.
in_sync=$(( replicas > 2 ? 2 : 1 ))
month=2592000000

create() {
  "$bin/kafka-topics.sh" --bootstrap-server "$bootstrap" --create --if-not-exists \
    --topic "$1" --partitions "$partitions" --replication-factor "$replicas" \
    --config "min.insync.replicas=$in_sync" --config "retention.ms=$2" \
    --config max.message.bytes=1048588
}

# Messages are keyed by model/version: one model's alerts stay in order within a partition.
create oodmon.alerts.v1 "$month"
create oodmon.retrain.v1 "$month"
