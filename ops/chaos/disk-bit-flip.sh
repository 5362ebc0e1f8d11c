#!/usr/bin/env bash
# Row 13: a bit flips in the written part of a node's log; the node does not vote with it, and comes back as
# a new one.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
node_kill 3
log=$(ls "$DIR"/node3/data/log/* | head -1)
# Files of the log are allocated ahead: the beginning is written, with more behind it.
flip "$log" 5000
step "a bit in the log of node 3 is flipped"
node_start 3
damaged() { grep -q 'damage' "$DIR/node3.log"; }
within 60 "node 3 says that its log is damaged" damaged
steady
stop node3
rm -rf "$DIR/node3/data"
node_start 3
within 60 "a new node 3 serves" hf node
within 60 "the tenant has three replicas" three_replicas
verify
done_well
