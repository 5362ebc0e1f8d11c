//! LocalStack's KMS, and a proxy before it that refuses one key, throttles, or answers nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::region::Region;
use crate::servers::CLOUD_REGION;

/// Asks a KMS; answers the body.
pub async fn call(
    endpoint: &str,
    target: &str,
    body: &serde_json::Value,
) -> Result<serde_json::Value> {
    let credential = format!(
        "AWS4-HMAC-SHA256 Credential=test/20260101/{CLOUD_REGION}/kms/aws4_request, SignedHeaders=host, Signature=0"
    );
    let out = tokio::process::Command::new("curl")
        .args(["-sS", "--max-time", "20"])
        .args(["-H", "Content-Type: application/x-amz-json-1.1"])
        .args(["-H", &format!("X-Amz-Target: TrentService.{target}")])
        .args(["-H", &format!("Authorization: {credential}")])
        .args(["-d", &body.to_string(), endpoint])
        .output()
        .await?;
    let text = String::from_utf8_lossy(&out.stdout);
    // Some calls answer nothing when they succeed.
    let body = if text.is_empty() { "{}" } else { text.as_ref() };
    let failed = || {
        format!(
            "KMS {target}: {text}{}",
            String::from_utf8_lossy(&out.stderr)
        )
    };
    let answer: serde_json::Value = serde_json::from_str(body).with_context(failed)?;
    ensure!(
        out.status.success() && answer.get("__type").is_none(),
        "{}",
        failed()
    );
    Ok(answer)
}

/// Does something with a key: `DisableKey`, `EnableKey`, `CancelKeyDeletion`.
pub async fn with_key(endpoint: &str, target: &str, arn: &str) -> Result<()> {
    let body = serde_json::json!({ "KeyId": arn });
    call(endpoint, target, &body).await.map(drop)
}

pub async fn schedule_deletion(endpoint: &str, arn: &str) -> Result<()> {
    let body = serde_json::json!({ "KeyId": arn, "PendingWindowInDays": 7 });
    call(endpoint, "ScheduleKeyDeletion", &body).await.map(drop)
}

/// A new key's ARN. LocalStack listens before it answers.
pub async fn create_key(endpoint: &str) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let answer = call(endpoint, "CreateKey", &serde_json::json!({})).await;
        if let Ok(answer) = &answer
            && let Some(arn) = answer["KeyMetadata"]["Arn"].as_str()
        {
            return Ok(arn.to_string());
        }
        ensure!(Instant::now() < deadline, "no key: {answer:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Calls that a node of `region` has made to its KMS.
pub async fn calls(region: &Region, n: usize) -> Result<u64> {
    let path = |name: &str| region.dir.path().join(name);
    let metrics = format!("https://{}/metrics", region.nodes[n].config.admin_address);
    let out = tokio::process::Command::new("curl")
        .args(["-sS", "--insecure", "--max-time", "10", "--cert"])
        .arg(path("operator.pem"))
        .arg("--key")
        .arg(path("operator-key.pem"))
        .arg(metrics)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = text
        .lines()
        .find(|l| l.starts_with("holdfast_kms_calls_total"));
    let count = line.and_then(|l| l.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(count.with_context(|| format!("no count: {text}"))? as u64)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Whoever uses this key is answered AccessDeniedException.
    Deny(String),
    /// Everybody is answered ThrottlingException.
    Throttle,
    /// Nobody is answered.
    Silence,
}

/// A proxy before a KMS. One request a connection.
pub struct Proxy {
    pub endpoint: String,
    mode: Arc<Mutex<Mode>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub async fn start(upstream: &str) -> Result<Self> {
        let upstream = upstream.trim_start_matches("http://").to_string();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let mode = Arc::new(Mutex::new(Mode::Pass));
        let own = mode.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (mode, upstream) = (own.clone(), upstream.clone());
                connections.spawn(async move {
                    let _ = serve(client, &upstream, &mode).await;
                });
            }
        });
        Ok(Proxy {
            endpoint,
            mode,
            task,
        })
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock() = mode;
    }
}

/// Reads one message with its body.
async fn message(from: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let mut more = [0u8; 16 << 10];
        let read = from.read(&mut more).await?;
        if read == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&more[..read]);
        let Some(head) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
        let length = text
            .lines()
            .find_map(|l| l.strip_prefix("content-length:")?.trim().parse().ok());
        if bytes.len() >= head + 4 + length.unwrap_or(0usize) {
            return Ok(bytes);
        }
    }
}

async fn serve(mut client: TcpStream, upstream: &str, mode: &Mutex<Mode>) -> std::io::Result<()> {
    let request = message(&mut client).await?;
    if request.is_empty() {
        return Ok(());
    }
    let names = |arn: &str| request.windows(arn.len()).any(|w| w == arn.as_bytes());
    let now = mode.lock().clone();
    let refusal = match &now {
        Mode::Deny(arn) if names(arn) => Some("AccessDeniedException"),
        Mode::Throttle => Some("ThrottlingException"),
        Mode::Silence => {
            // Until the caller gives up.
            let _ = client.read(&mut [0u8; 1]).await;
            return Ok(());
        }
        Mode::Pass | Mode::Deny(_) => None,
    };
    let answer = match refusal {
        Some(name) => {
            let body = format!("{{\"__type\":\"{name}\",\"message\":\"by the test\"}}");
            format!("HTTP/1.1 400 Bad Request\r\nContent-Type: application/x-amz-json-1.1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
        }
        None => {
            let mut server = TcpStream::connect(upstream).await?;
            server.write_all(&request).await?;
            let answer = message(&mut server).await?;
            // The connection ends here: say so, or the client takes the next call's loss for ours.
            let text = String::from_utf8_lossy(&answer).into_owned();
            let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
            let head: Vec<&str> = head
                .lines()
                .filter(|l| !l.to_lowercase().starts_with("connection:"))
                .collect();
            format!("{}\r\nConnection: close\r\n\r\n{body}", head.join("\r\n")).into_bytes()
        }
    };
    client.write_all(&answer).await
}
