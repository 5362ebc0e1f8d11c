#!/usr/bin/env bash
# Row 20: PUTs are applied and every second answer is lost; each link is there once.
. "$(dirname "$0")/lib.sh"
minio_start
proxy_start
region_start
echo lose-answers > "$DIR/mode"
step "every second answer to a PUT is lost"
for _ in 1 2 3 4 5; do steady; sleep 1; done
echo pass > "$DIR/mode"
step "answers arrive again"
drilled
verify
done_well
