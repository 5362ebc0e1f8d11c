#!/usr/bin/env bash
# Row 5: the leader is cut off from the other zones and from the bucket; it steps down, and its late
# entries reach nobody. Needs root: each node has a network namespace.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/network.sh"
network_start
minio_start
region_start
old=$(leader)
cut "$old"
step "the leader, node $old, is cut off"
within 30 "another node leads" has_leader "$old"
steady
heal "$old"
step "its network is back"
within 60 "three nodes serve" hf node
steady
drilled
verify
done_well
