#!/usr/bin/env bash
# Row 4: two zones of three are lost; writes are refused, and go on when one is back.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
for n in 1 2; do node_kill $n; done
step "nodes 1 and 2 are killed"
no_writes 8
read_alone() { "$BIN/holdfast-oracle" read --endpoints "${ENDPOINTS##*,}" --user app@acme --password $PASSWORD --record "$DIR/record"; }
expect "no linearizable read is answered by the last node" not read_alone
node_start 1
within 30 "there is a leader" has_leader
steady
node_start 2
within 60 "three nodes serve" hf node
verify
done_well
