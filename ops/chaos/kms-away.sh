#!/usr/bin/env bash
# Row 25: the KMS does not answer; within the grace the tenant is served, after it sealed, and it
# resumes by itself.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/keys.sh"
on_localstack
hf tenant set acme --key-grace 20s >/dev/null
signal STOP localstack
step "the KMS is paused; the tenant's grace is 20 s"
steady
within 120 "the tenant is sealed on three nodes" sealed
no_writes 3
signal CONT localstack
step "the KMS is back"
within 90 "the tenant is served again" proven
steady
drilled
verify
done_well
