//! Files of a directory, and harm to them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

/// Every file below `dir`.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path),
            }
        }
    }
    found
}

/// Flips a bit in the middle of each file.
pub fn flip(files: &[PathBuf]) -> Result<()> {
    for file in files {
        let file = File::options().read(true).write(true).open(file)?;
        let (middle, mut byte) = (file.metadata()?.len() / 2, [0u8]);
        file.read_exact_at(&mut byte, middle)?;
        file.write_all_at(&[byte[0] ^ 1], middle)?;
    }
    Ok(())
}
