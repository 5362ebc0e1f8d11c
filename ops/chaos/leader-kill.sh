#!/usr/bin/env bash
# Row 1: the leader is killed; another is elected and no acknowledged write is lost.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
old=$(leader)
node_kill "$old"
step "the leader, node $old, is killed"
within 20 "another node leads" has_leader "$old"
steady
node_start "$old"
within 60 "the old leader is back" hf node
drilled
verify
done_well
