//! What tests, demo and benchmarks share: regions of real processes, test servers, a load.

pub mod debian;
pub mod failpoint;
pub mod files;
pub mod forgetful;
pub mod history;
pub mod kms;
pub mod linear;
pub mod load;
pub mod memory;
pub mod netns;
pub mod opened;
pub mod plain;
pub mod proxy;
pub mod region;
pub mod served;
pub mod servers;
pub mod writer;

use std::path::PathBuf;

/// Where the build put `holdfastd` and `holdfast`.
pub fn binary(name: &str) -> PathBuf {
    let mut dir = std::env::current_exe().expect("a running program has a path");
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not built: run it through make",
        path.display()
    );
    path
}
