#!/usr/bin/env bash
# Row 11: fsync fails on the leader; its process ends rather than acknowledge, another leads, and it
# comes back.
. "$(dirname "$0")/lib.sh"
minio_start
for n in 1 2 3; do
  mkdir -p "$DIR/fiu$n"
  WRAP[$n]="fiu-run -x -f $DIR/fiu$n/ctrl"
done
region_start
old=$(leader)
daemon=$(pgrep -g "${PID[node$old]}" -x holdfastd)
fiu-ctrl -f "$DIR/fiu$old/ctrl" -c 'enable name=posix/io/sync/*' "$daemon"
step "every fsync of the leader, node $old, fails"
gone() { not kill -0 "$daemon"; }
within 60 "node $old has ended" gone
within 20 "another node leads" has_leader "$old"
steady
WRAP[$old]=
stop "node$old"
node_start "$old"
within 60 "three nodes serve" hf node
verify
done_well
