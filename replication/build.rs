//! Compiles the protobuf messages (without protoc) and the C++ file of the encrypted Env.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto");
    let fds = protox::compile(
        [
            "../proto/etcd/api/etcdserverpb/rpc.proto",
            "../proto/holdfast/command.proto",
        ],
        ["../proto"],
    )?;
    prost_build::Config::new().bytes(["."]).compile_fds(fds)?;

    println!("cargo:rerun-if-changed=src/engine/env.cc");
    let rocksdb = PathBuf::from(std::env::var("DEP_ROCKSDB_CARGO_MANIFEST_DIR")?).join("rocksdb");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .flag("-fno-rtti")
        .include(rocksdb.join("include"))
        .include(rocksdb)
        .warnings(false)
        .file("src/engine/env.cc")
        .compile("holdfast_env");
    Ok(())
}
