# Shared by the scenarios with a KMS: LocalStack beside MinIO, and a tenant under a key of its own.
on_localstack() {
  minio_start
  localstack_start
  local made
  made() { kms CreateKey '{}' > "$DIR/key.json"; }
  within 60 "there is a KMS key" made
  KEY=$(grep -o '"Arn": *"[^"]*"' "$DIR/key.json" | cut -d'"' -f4)
  laid_out
  local n
  for n in 1 2 3; do printf '\n[kms.aws]\ncloud_region = "%s"\nendpoint = "%s"\n' $CLOUD "$LOCALSTACK" >> "$DIR/node$n/node.toml"; done
  region_start "$KEY"
}
sealed() { hf tenant show acme | grep -c '^key on .*sealed' | grep -qx 3; }
proven() { hf tenant show acme | grep -c '^key on .*: proven' | grep -qx 3; }
