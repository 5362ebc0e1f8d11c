//! The machine's Debian package index as JSON documents: real input for demo and tests.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// `pkg/<name>/<version>` and the stanza as JSON, in order, without duplicates.
pub fn documents() -> Result<BTreeMap<String, Vec<u8>>> {
    let mut documents = BTreeMap::new();
    for entry in
        std::fs::read_dir("/var/lib/apt/lists").context("no package index: run apt-get update")?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.contains("_Packages") {
            for stanza in read(&path)?.split("\n\n") {
                documents.extend(document(stanza));
            }
        }
    }
    anyhow::ensure!(
        !documents.is_empty(),
        "the package index is empty: run apt-get update"
    );
    Ok(documents)
}

fn read(path: &Path) -> Result<String> {
    let extension = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    if extension == "lz4" || extension == "xz" || extension == "gz" {
        let out = Command::new("/usr/lib/apt/apt-helper")
            .arg("cat-file")
            .arg(path)
            .output()?;
        anyhow::ensure!(
            out.status.success(),
            "apt-helper cannot read {}",
            path.display()
        );
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    Ok(std::fs::read_to_string(path)?)
}

fn document(stanza: &str) -> Option<(String, Vec<u8>)> {
    let mut fields: BTreeMap<&str, String> = BTreeMap::new();
    let mut last = "";
    for line in stanza.lines() {
        if line.starts_with([' ', '\t']) {
            let text = fields.get_mut(last)?;
            text.push('\n');
            text.push_str(line.trim());
        } else if let Some((field, value)) = line.split_once(':') {
            last = field;
            fields.insert(field, value.trim().to_string());
        }
    }
    let key = format!("pkg/{}/{}", fields.get("Package")?, fields.get("Version")?);
    Some((key, serde_json::to_vec(&fields).ok()?))
}
