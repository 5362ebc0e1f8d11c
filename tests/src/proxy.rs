//! A proxy before an object store, which can lose answers, refuse requests and cut connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Requests arrive; of every second PUT the answer is lost.
    LoseAnswers,
    /// Every request is answered with this status.
    Refuse(u16),
    /// Requests go on after so many milliseconds.
    Delay(u64),
    /// The connection is reset once this many bytes of a request have gone on.
    CutAfter(usize),
    /// The connection is reset once this many bytes of an answer have gone on.
    CutAnswers(usize),
}

pub struct Proxy {
    pub endpoint: String,
    mode: Arc<Mutex<Mode>>,
    /// Requests that were not passed on unharmed.
    harmed: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    pub async fn start(upstream: &str) -> Result<Self> {
        let upstream: SocketAddr = upstream.trim_start_matches("http://").parse()?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let mode = Arc::new(Mutex::new(Mode::Pass));
        let harmed = Arc::new(AtomicU64::new(0));
        let (own, count) = (mode.clone(), harmed.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (mode, harmed) = (own.clone(), count.clone());
                connections.spawn(async move {
                    let _ = serve(client, upstream, mode, harmed).await;
                });
            }
        });
        Ok(Proxy {
            endpoint,
            mode,
            harmed,
            task,
        })
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock() = mode;
    }

    pub fn harmed(&self) -> u64 {
        self.harmed.load(Ordering::SeqCst)
    }
}

async fn serve(
    mut client: TcpStream,
    upstream: SocketAddr,
    mode: Arc<Mutex<Mode>>,
    harmed: Arc<AtomicU64>,
) -> std::io::Result<()> {
    let mut server = TcpStream::connect(upstream).await?;
    let (mut up, mut down) = (vec![0u8; 64 << 10], vec![0u8; 64 << 10]);
    let (mut is_put, mut sent, mut answered) = (false, 0, 0);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let bytes = &up[..read?];
                if bytes.is_empty() {
                    return Ok(());
                }
                // A request's head comes in one piece: clients write it at once.
                if bytes.starts_with(b"PUT ") || bytes.starts_with(b"GET ")
                    || bytes.starts_with(b"HEAD ") || bytes.starts_with(b"POST ")
                    || bytes.starts_with(b"DELETE ")
                {
                    is_put = bytes.starts_with(b"PUT ");
                    (sent, answered) = (0, 0);
                }
                let now = *mode.lock();
                sent += bytes.len();
                match now {
                    Mode::Refuse(status) => {
                        harmed.fetch_add(1, Ordering::SeqCst);
                        let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>Refused</Code><Message>refused</Message></Error>";
                        let answer = format!("HTTP/1.1 {status} Refused\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                        client.write_all(answer.as_bytes()).await?;
                        return Ok(());
                    }
                    Mode::CutAfter(limit) if sent > limit => {
                        harmed.fetch_add(1, Ordering::SeqCst);
                        return Ok(());
                    }
                    Mode::Delay(ms) => {
                        harmed.fetch_add(1, Ordering::SeqCst);
                        tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
                        server.write_all(bytes).await?;
                    }
                    _ => server.write_all(bytes).await?,
                }
            }
            read = server.read(&mut down) => {
                let bytes = &down[..read?];
                if bytes.is_empty() {
                    return Ok(());
                }
                if is_put && *mode.lock() == Mode::LoseAnswers
                    && harmed.fetch_add(1, Ordering::SeqCst).is_multiple_of(2)
                {
                    return Ok(());
                }
                answered += bytes.len();
                if let Mode::CutAnswers(limit) = *mode.lock()
                    && answered > limit
                {
                    harmed.fetch_add(1, Ordering::SeqCst);
                    return Ok(());
                }
                client.write_all(bytes).await?;
            }
        }
    }
}
