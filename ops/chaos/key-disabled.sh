#!/usr/bin/env bash
# Row 26: the customer disables the key; the tenant is sealed on every node within 60 s, and resumes
# when it is enabled.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/keys.sh"
on_localstack
expect "the key is disabled" kms DisableKey "{\"KeyId\":\"$KEY\"}"
within 60 "the tenant is sealed on three nodes" sealed
no_writes 3
expect "the key is enabled" kms EnableKey "{\"KeyId\":\"$KEY\"}"
within 90 "the tenant is served again" proven
steady
drilled
verify
done_well
