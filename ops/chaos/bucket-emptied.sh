#!/usr/bin/env bash
# Row 24: somebody deletes every object of the bucket; its versions bring them back, and the region,
# lost meanwhile, is restored from them.
. "$(dirname "$0")/lib.sh"
localstack_start
S3=$LOCALSTACK
within 60 "there is a bucket" made_bucket
s3 PUT 'holdfast?versioning' --data-binary '<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>Enabled</Status></VersioningConfiguration>'
region_start
stop load
caught_up
for n in 1 2 3; do node_kill $n; rm -rf "$DIR/node$n/data"; done
keys() { s3 GET "holdfast?list-type=2" | grep -o '<Key>[^<]*' | cut -c6- || true; }
while [ -n "$(keys)" ]; do keys | while read -r key; do s3 DELETE "holdfast/$key"; done; done
step "the region is lost, and its bucket emptied"
# A delete marker removed is an object brought back.
markers() {
  s3 GET 'holdfast?versions' | tr -d '\n' | sed 's/<DeleteMarker>/\n&/g; s/<\/DeleteMarker>/\n/g' | grep '^<DeleteMarker>' |
    sed 's/.*<Key>\([^<]*\)<\/Key>.*<VersionId>\([^<]*\)<.*/\1 \2/' || true
}
while [ -n "$(markers)" ]; do markers | while read -r key version; do s3 DELETE "holdfast/$key?versionId=$version"; done; done
step "the versions are brought back"
for n in 1 2 3; do node_start $n; done
within 60 "three nodes wait for a restore" awaiting
expect "the region is restored" hf disaster declare --region eu --report "$DIR/report.json"
verify
load_start
steady
verify
done_well
