//! Compiles the services; etcd's messages are those of the replication library.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto");
    let mut compiler = protox::Compiler::new(["../proto"])?;
    compiler.include_imports(true).include_source_info(false);
    compiler.open_files([
        "../proto/etcd/api/etcdserverpb/rpc.proto",
        "../proto/holdfast/admin.proto",
        "../proto/holdfast/health.proto",
    ])?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .generate_default_stubs(true)
        .bytes(".")
        .extern_path(".etcdserverpb", "::replication::proto::etcdserverpb")
        .extern_path(".mvccpb", "::replication::proto::mvccpb")
        .extern_path(".authpb", "::replication::proto::authpb")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
