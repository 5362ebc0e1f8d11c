#!/usr/bin/env bash
# Row 32: every node and every disk is lost at once; the region is restored from its bucket, and what
# was acknowledged before the RPO is there.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
stop load
caught_up
for n in 1 2 3; do node_kill $n; rm -rf "$DIR/node$n/data"; done
step "every node and every disk is gone"
for n in 1 2 3; do node_start $n; done
within 60 "three nodes wait for a restore" awaiting
expect "disaster declare restores it" hf disaster declare --region eu --report "$DIR/report.json"
step "$(tail -n 2 "$DIR/said" | tr '\n' ' ')"
expect "its report verifies" hf disaster verify "$DIR/report.json" --ca "$DIR/ca.pem"
verify
load_start
steady
verify
done_well
