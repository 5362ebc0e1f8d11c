#!/usr/bin/env bash
# Row 7: the leader is stopped past the election time-out, and goes on as if nothing were: its late
# answers must not be stale.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
old=$(leader)
node_pause "$old"
step "the leader, node $old, is paused"
others_lead() {
  local now
  now=$(timeout 5 "$BIN/holdfast" --config "$DIR/others.toml" tenant show acme | sed -n 's/.*(leader node\([0-9]*\)).*/\1/p')
  [ -n "$now" ] && [ "$now" != "$old" ]
}
# Asked of the others: a paused node does not answer.
awk -v skip="$old" '/^endpoints/,/\]/ { line = line $0; next } { print }
  END { n = split(line, a, "\""); out = ""; for (i = 2; i <= n; i += 2) if (i / 2 != skip) out = out (out ? ", " : "") "\"" a[i] "\""; print "endpoints = [" out "]" }' \
  "$DIR/operator.toml" > "$DIR/others.toml"
within 20 "another node leads" others_lead
steady
node_resume "$old"
step "node $old goes on"
steady
within 30 "one leader is known to all" has_leader "$old"
verify
done_well
