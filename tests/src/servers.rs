//! Real servers that tests start: MinIO, LocalStack, SeaweedFS, etcd. One that cannot be had fails
//! the test that needs it, by name.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;

pub const USER: &str = "holdfast";
pub const SECRET: &str = "holdfast-secret";
pub const CLOUD_REGION: &str = "eu-central-1";

/// A running server; dropped, it is killed.
pub struct Server {
    child: Child,
    pub endpoint: String,
    pub dir: tempfile::TempDir,
}

impl Server {
    /// Signals the whole process group: LocalStack's supervisor has children.
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: a signal to a group that this process made.
        #[allow(unsafe_code)]
        unsafe {
            libc::kill(-(self.child.id() as libc::pid_t), signal);
        }
    }

    /// Answers nothing until `resume`.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        let _ = self.child.wait();
    }
}

pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

pub fn tool(name: &str) -> Result<PathBuf> {
    let root = std::env::var("HOLDFAST_TOOLS").unwrap_or_else(|_| {
        format!(
            "{}/.cache/holdfast/tools",
            std::env::var("HOME").unwrap_or_default()
        )
    });
    let path = Path::new(&root).join("bin").join(name);
    ensure!(
        path.exists(),
        "{name} cannot be had: {} does not exist; run tools/setup test",
        path.display()
    );
    Ok(path)
}

fn spawn(mut command: Command, dir: &tempfile::TempDir) -> Result<Child> {
    use std::os::unix::process::CommandExt;
    let out = std::fs::File::create(dir.path().join("server.log"))?;
    command.process_group(0);
    command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    Ok(command.spawn()?)
}

async fn listening(server: &mut Server, port: u16, within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    while tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .is_err()
    {
        let ended = server.child.try_wait()?;
        let log = std::fs::read_to_string(server.dir.path().join("server.log")).unwrap_or_default();
        ensure!(
            ended.is_none() && Instant::now() < deadline,
            "the server does not listen: {ended:?}\n{log}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

pub async fn minio() -> Result<Server> {
    let (dir, port, console) = (tempfile::tempdir()?, free_port()?, free_port()?);
    let mut command = Command::new(tool("minio")?);
    command
        .args([
            "server",
            "--quiet",
            "--address",
            &format!("127.0.0.1:{port}"),
            "--console-address",
            &format!("127.0.0.1:{console}"),
        ])
        .arg(dir.path().join("data"))
        .envs([
            ("MINIO_ROOT_USER", USER),
            ("MINIO_ROOT_PASSWORD", SECRET),
            ("MINIO_REGION", CLOUD_REGION),
        ]);
    let child = spawn(command, &dir)?;
    let mut server = Server {
        child,
        endpoint: format!("http://127.0.0.1:{port}"),
        dir,
    };
    listening(&mut server, port, Duration::from_secs(30))
        .await
        .context("MinIO")?;
    Ok(server)
}

pub async fn seaweedfs() -> Result<Server> {
    let (dir, port) = (tempfile::tempdir()?, free_port()?);
    std::fs::create_dir(dir.path().join("data"))?;
    let mut command = Command::new(tool("weed")?);
    command
        .arg("mini")
        .arg(format!("-dir={}", dir.path().join("data").display()))
        .args([
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            &format!("-s3.port={port}"),
        ])
        .args([
            format!("-master.port={}", free_port()?),
            format!("-volume.port={}", free_port()?),
            format!("-filer.port={}", free_port()?),
        ])
        .envs([
            ("AWS_ACCESS_KEY_ID", USER),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
        ]);
    let child = spawn(command, &dir)?;
    let mut server = Server {
        child,
        endpoint: format!("http://127.0.0.1:{port}"),
        dir,
    };
    listening(&mut server, port, Duration::from_secs(60))
        .await
        .context("SeaweedFS")?;
    Ok(server)
}

/// LocalStack with S3 and KMS.
pub async fn localstack() -> Result<Server> {
    let (dir, port) = (tempfile::tempdir()?, free_port()?);
    let mut command = Command::new(tool("localstack-supervisor")?);
    command.envs([
        ("SERVICES", "s3,kms".to_string()),
        ("GATEWAY_LISTEN", format!("127.0.0.1:{port}")),
        ("EAGER_SERVICE_LOADING", "1".into()),
        (
            "LOCALSTACK_VOLUME_DIR",
            dir.path().join("volume").display().to_string(),
        ),
        ("TMPDIR", dir.path().display().to_string()),
        ("DNS_ADDRESS", "0".into()),
        ("DISABLE_EVENTS", "1".into()),
        ("SKIP_SSL_CERT_DOWNLOAD", "1".into()),
    ]);
    let child = spawn(command, &dir)?;
    let mut server = Server {
        child,
        endpoint: format!("http://127.0.0.1:{port}"),
        dir,
    };
    listening(&mut server, port, Duration::from_secs(120))
        .await
        .context("LocalStack")?;
    Ok(server)
}

/// One etcd.
pub async fn etcd() -> Result<Server> {
    let (dir, port, peer) = (tempfile::tempdir()?, free_port()?, free_port()?);
    let url = format!("http://127.0.0.1:{port}");
    let peer = format!("http://127.0.0.1:{peer}");
    let mut command = Command::new(tool("etcd")?);
    command
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .args([
            "--name",
            "one",
            "--listen-client-urls",
            &url,
            "--advertise-client-urls",
            &url,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &format!("one={peer}"),
        ]);
    let child = spawn(command, &dir)?;
    let mut server = Server {
        child,
        endpoint: url,
        dir,
    };
    listening(&mut server, port, Duration::from_secs(30))
        .await
        .context("etcd")?;
    Ok(server)
}

/// Credentials for daemons that use these servers.
pub fn credentials() -> Vec<(String, String)> {
    vec![
        ("AWS_ACCESS_KEY_ID".into(), USER.into()),
        ("AWS_SECRET_ACCESS_KEY".into(), SECRET.into()),
    ]
}

pub fn s3(endpoint: &str, bucket: &str) -> Result<impl ObjectStore> {
    Ok(AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region(CLOUD_REGION)
        .with_bucket_name(bucket)
        .with_access_key_id(USER)
        .with_secret_access_key(SECRET)
        .build()?)
}

/// What a store answers to a signed request: the HTTP status, and head and body.
pub async fn signed(
    url: &str,
    method: &str,
    headers: &[&str],
    body: &str,
) -> Result<(String, String)> {
    let mut curl = tokio::process::Command::new("curl");
    curl.args(["-sS", "-w", "\n%{http_code}", "--max-time", "20"]);
    match method {
        "HEAD" => curl.arg("--head"),
        _ => curl.args(["-X", method]),
    };
    let region = format!("aws:amz:{CLOUD_REGION}:s3");
    curl.args([
        "--aws-sigv4",
        &region,
        "--user",
        &format!("{USER}:{SECRET}"),
    ]);
    let always = [
        "x-amz-content-sha256: UNSIGNED-PAYLOAD",
        "Content-Type: application/xml",
    ];
    for header in always.iter().chain(headers) {
        curl.args(["-H", header]);
    }
    if !body.is_empty() {
        curl.args(["--data-binary", body]);
    }
    let out = curl.arg(url).output().await?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    match said.rsplit_once('\n') {
        Some((text, code)) if code != "000" => Ok((code.into(), text.into())),
        _ => anyhow::bail!("{}", String::from_utf8_lossy(&out.stderr)),
    }
}

/// Makes a bucket, retrying while the server is starting.
pub async fn make_bucket(endpoint: &str, bucket: &str) -> Result<()> {
    make_bucket_with(endpoint, bucket, &[]).await
}

/// Makes a bucket whose objects can be locked.
pub async fn make_lockable_bucket(endpoint: &str, bucket: &str) -> Result<()> {
    make_bucket_with(
        endpoint,
        bucket,
        &["x-amz-bucket-object-lock-enabled: true"],
    )
    .await
}

async fn make_bucket_with(endpoint: &str, bucket: &str, headers: &[&str]) -> Result<()> {
    let body = format!(
        "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><LocationConstraint>{CLOUD_REGION}</LocationConstraint></CreateBucketConfiguration>"
    );
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let said = signed(&format!("{endpoint}/{bucket}"), "PUT", headers, &body).await;
        if matches!(&said, Ok((code, _)) if code == "200") {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "bucket {bucket} cannot be made: {said:?}"
        );
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Asks LocalStack's S3, which checks no signature, for what the object store's library lacks.
pub async fn ask_localstack(
    endpoint: &str,
    method: &str,
    path: &str,
    body: &str,
) -> Result<String> {
    let credential = format!(
        "AWS4-HMAC-SHA256 Credential=test/20260101/{CLOUD_REGION}/s3/aws4_request, SignedHeaders=host, Signature=0"
    );
    let out = tokio::process::Command::new("curl")
        .args(["-sS", "--max-time", "20", "-X", method])
        .args(["-H", &format!("Authorization: {credential}")])
        .args(["-H", "Content-Type: application/xml"])
        .args(["-d", body, &format!("{endpoint}/{path}")])
        .output()
        .await?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Has a bucket of LocalStack's keep every version of its objects.
pub async fn keep_versions(endpoint: &str, bucket: &str) -> Result<()> {
    let enable = "<VersioningConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Status>Enabled</Status></VersioningConfiguration>";
    let path = format!("{bucket}?versioning");
    ask_localstack(endpoint, "PUT", &path, enable).await?;
    let enabled = ask_localstack(endpoint, "GET", &path, "").await?;
    ensure!(enabled.contains("Enabled"), "{enabled}");
    Ok(())
}

/// Three etcds that are one cluster.
pub struct EtcdCluster {
    members: Vec<Server>,
}

impl EtcdCluster {
    pub fn pids(&self) -> Vec<u32> {
        self.members.iter().map(|m| m.child.id()).collect()
    }

    /// The endpoint of the leader.
    pub async fn leader(&self) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for member in &self.members {
                if let Ok(mut client) = etcd_client::Client::connect([&member.endpoint], None).await
                    && let Ok(status) = client.status().await
                    && status.leader() != 0
                    && status
                        .header()
                        .is_some_and(|h| h.member_id() == status.leader())
                {
                    return Ok(member.endpoint.clone());
                }
            }
            ensure!(Instant::now() < deadline, "etcd has no leader");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

pub async fn etcd_cluster() -> Result<EtcdCluster> {
    let ports: Vec<(u16, u16)> = (0..3)
        .map(|_| Ok((free_port()?, free_port()?)))
        .collect::<Result<_>>()?;
    let peers: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(n, p)| format!("e{n}=http://127.0.0.1:{}", p.1))
        .collect();
    let mut members = Vec::new();
    for (n, (port, peer)) in ports.iter().enumerate() {
        let dir = tempfile::tempdir()?;
        let (url, peer) = (
            format!("http://127.0.0.1:{port}"),
            format!("http://127.0.0.1:{peer}"),
        );
        let mut command = Command::new(tool("etcd")?);
        command
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .args([
                "--name",
                &format!("e{n}"),
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args([
                "--initial-cluster",
                &peers.join(","),
                "--quota-backend-bytes",
                "8589934592",
            ]);
        let child = spawn(command, &dir)?;
        members.push(Server {
            child,
            endpoint: url,
            dir,
        });
    }
    for (member, (port, _)) in members.iter_mut().zip(&ports) {
        listening(member, *port, Duration::from_secs(30))
            .await
            .context("etcd")?;
    }
    Ok(EtcdCluster { members })
}
