#!/usr/bin/env bash
# Row 18: the bucket's store is down for a while; writes go on, the ledger grows and says so, and the
# archive catches up by itself.
. "$(dirname "$0")/lib.sh"
minio_start
region_start
stop minio
step "the store is killed"
steady
within 30 "the RPO is said to be breached" breached
steady
minio_run
step "the store is back"
drilled
verify
done_well
