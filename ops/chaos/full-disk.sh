#!/usr/bin/env bash
# Row 10: the leader's disk fills; the tenant is served on, and with room the node is as the others.
# Needs root: the disks are tmpfs.
. "$(dirname "$0")/lib.sh"
undo() { for n in 1 2 3; do umount -l "$DIR/node$n/data"; done; }
minio_start
laid_out
for n in 1 2 3; do
  mkdir -p "$DIR/node$n/data"
  mount -t tmpfs -o size=256m,mode=700 none "$DIR/node$n/data"
done
region_start
full=$(leader)
dd if=/dev/zero of="$DIR/node$full/data/ballast" bs=1M status=none 2>/dev/null || true
step "the disk of the leader, node $full, is full"
for _ in 1 2 3 4 5; do steady; sleep 1; done
rm "$DIR/node$full/data/ballast"
step "there is room again"
kill -0 "${PID[node$full]}" 2>/dev/null || { step "node $full had ended: it is started"; stop "node$full"; node_start "$full"; }
within 60 "three nodes serve" hf node
steady
caught_up
verify
done_well
