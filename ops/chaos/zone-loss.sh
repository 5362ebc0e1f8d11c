#!/usr/bin/env bash
# Row 3: a zone is lost with its disk; the others serve, and a new node takes its place.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
node_kill 2
rm -rf "$DIR/node2/data"
step "node 2 and its disk are gone"
within 20 "there is a leader" has_leader
steady
node_start 2
within 60 "a new node 2 serves" hf node
within 60 "the tenant has three replicas" three_replicas
# Now the new one must count: without another zone it is half of the majority.
node_kill 3
within 20 "there is a leader" has_leader 3
steady
node_start 3
verify
done_well
