#!/usr/bin/env bash
# Row 18: the store answers slowly, then 503; service goes on, and the archive catches up.
. "$(dirname "$0")/lib.sh"
minio_start
proxy_start
region_start
echo "delay 300" > "$DIR/mode"
step "every request to the store takes 300 ms longer"
for _ in 1 2 3; do steady; sleep 1; done
echo "refuse 503" > "$DIR/mode"
step "the store answers 503"
steady
alarmed() { grep -q 'archiving does not succeed' "$DIR"/node?.log; }
within 30 "a node says that archiving does not succeed" alarmed
within 30 "the RPO is said to be breached" breached
echo pass > "$DIR/mode"
step "the store answers again"
drilled
verify
done_well
