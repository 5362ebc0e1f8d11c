#!/usr/bin/env bash
# Row 23: the bucket's credentials are denied; an alarm, service goes on, and nothing is written
# anywhere else.
. "$(dirname "$0")/lib.sh"
minio_start
proxy_start
region_start
echo "refuse 403" > "$DIR/mode"
step "the store denies access"
steady
within 30 "the RPO is said to be breached" breached
elsewhere() { [ -z "$(find "$DIR" -path "$DIR/minio" -prune -o -path '*/chain/*' -print)" ]; }
expect "nothing of the archive lies elsewhere" elsewhere
echo pass > "$DIR/mode"
step "access is allowed again"
drilled
verify
done_well
