//! `holdfast-oracle`: writes numbered values through etcd's protocol and keeps a record of each, then
//! reads back and says whether anything that was acknowledged is lost.
//!
//! The record is a file of lines, `s KEY N` before a put is sent and `a KEY N MS REVISION` once it was
//! acknowledged (milliseconds since 1970), so that whoever dies leaves what it knew. A key is written by
//! one writer, one put after the other: what it holds must be the newest acknowledged number, or one that
//! was not acknowledged and was applied after it. (A put whose answer did not come can be applied late.)

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};
use etcd_client::{Client, ConnectOptions};

const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
const READ_WITHIN: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(version, about = "Writes, keeps a record, and verifies it")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Target {
    /// Client addresses, with a comma between them.
    #[arg(long, value_delimiter = ',', required = true)]
    endpoints: Vec<String>,
    /// USER@TENANT.
    #[arg(long)]
    user: String,
    #[arg(long)]
    password: String,
    #[arg(long)]
    record: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Writes until it is ended.
    Write {
        #[command(flatten)]
        target: Target,
        /// Clients that write at once, each to keys of its own.
        #[arg(long, default_value_t = 4)]
        writers: usize,
        /// Keys of each.
        #[arg(long, default_value_t = 100)]
        keys: usize,
        /// Milliseconds between two writes of one.
        #[arg(long, default_value_t = 5)]
        pause: u64,
    },
    /// Tries one linearizable read; fails if nobody answers it.
    Read {
        #[command(flatten)]
        target: Target,
    },
    /// Reads everything back; fails if an acknowledged write is lost, or there is what nobody wrote.
    Verify {
        #[command(flatten)]
        target: Target,
    },
}

fn now_ms() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis()
}

async fn connect(endpoint: &str, target: &Target) -> Result<Client, String> {
    let options = ConnectOptions::new()
        .with_user(target.user.as_str(), target.password.as_str())
        .with_connect_timeout(ANSWERS_WITHIN)
        .with_timeout(ANSWERS_WITHIN);
    let connected =
        tokio::time::timeout(ANSWERS_WITHIN, Client::connect([endpoint], Some(options)));
    match connected.await {
        Ok(connected) => connected.map_err(|e| format!("{endpoint}: {e}")),
        Err(_) => Err(format!("{endpoint} does not answer")),
    }
}

/// A client of whichever endpoint answers, beginning with the one numbered `first`.
async fn any(target: &Target, first: usize) -> Result<Client, String> {
    let mut why = String::new();
    for n in 0..target.endpoints.len() {
        let endpoint = &target.endpoints[(first + n) % target.endpoints.len()];
        match connect(endpoint, target).await {
            Ok(client) => return Ok(client),
            Err(e) => why = e,
        }
    }
    Err(why)
}

struct Record(Mutex<std::fs::File>);

impl Record {
    fn line(&self, text: &str) -> Result<(), String> {
        let mut file = self.0.lock().map_err(|e| e.to_string())?;
        writeln!(file, "{text}").map_err(|e| format!("the record: {e}"))
    }
}

async fn write(
    target: Arc<Target>,
    record: Arc<Record>,
    writer: usize,
    keys: usize,
    pause: Duration,
    first: u64,
) -> Result<(), String> {
    let mut endpoint = writer;
    let mut client: Option<Client> = None;
    for n in first.. {
        let key = format!("oracle/{writer}/{:04}", n % keys as u64);
        if client.is_none() {
            client = any(&target, endpoint).await.ok();
        }
        let Some(to) = &mut client else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        record.line(&format!("s {key} {n}"))?;
        let put = to.put(key.as_str(), n.to_string(), None);
        match tokio::time::timeout(ANSWERS_WITHIN, put).await {
            Ok(Ok(done)) => {
                let revision = done.header().map_or(0, |header| header.revision());
                record.line(&format!("a {key} {n} {} {revision}", now_ms()))?;
            }
            // Whether it was done is not known. Another node may serve.
            _ => {
                client = None;
                endpoint += 1;
            }
        }
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// What the record says of one key.
#[derive(Default)]
struct Known {
    /// The newest, with its revision.
    acknowledged: Option<(u64, u64)>,
    /// Those of which no answer came.
    unknown: Vec<u64>,
}

impl Known {
    /// Whether the key may hold this number, of this revision.
    fn allows(&self, found: Option<(u64, u64)>) -> bool {
        match (found, self.acknowledged) {
            (Some((found, at)), Some((last, revision))) => {
                found == last || (at > revision && self.unknown.contains(&found))
            }
            (Some((found, _)), None) => self.unknown.contains(&found),
            (None, acknowledged) => acknowledged.is_none(),
        }
    }
}

#[derive(Default)]
struct Read {
    keys: BTreeMap<String, Known>,
    acknowledged: u64,
    /// The greatest number that was sent.
    last: u64,
    /// The longest time without any acknowledgement, in milliseconds.
    longest_pause: u64,
}

fn read(path: &Path) -> Result<Read, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut read = Read::default();
    let mut last: Option<u64> = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at).and_then(|w| w.parse::<u64>().ok());
        // The last line may be cut short.
        let (Some(key), Some(n)) = (words.get(1), number(2)) else {
            continue;
        };
        let known = read.keys.entry((*key).to_string()).or_default();
        read.last = read.last.max(n);
        match (words[0], number(3), number(4)) {
            ("s", _, _) => known.unknown.push(n),
            ("a", Some(ms), Some(revision)) => {
                known.acknowledged = Some((n, revision));
                known.unknown.retain(|sent| *sent != n);
                read.acknowledged += 1;
                let pause = last.map_or(0, |last| ms.saturating_sub(last));
                read.longest_pause = read.longest_pause.max(pause);
                last = Some(ms);
            }
            _ => {}
        }
    }
    Ok(read)
}

/// The number that a key holds, and the revision that it was put at.
async fn get(
    target: &Target,
    client: &mut Option<Client>,
    key: &str,
) -> Result<Option<(u64, u64)>, String> {
    let deadline = Instant::now() + READ_WITHIN;
    let mut endpoint = 0;
    loop {
        let mut why = String::new();
        if client.is_none() {
            match any(target, endpoint).await {
                Ok(connected) => *client = Some(connected),
                Err(e) => why = e,
            }
        }
        if let Some(from) = client {
            match tokio::time::timeout(ANSWERS_WITHIN, from.get(key, None)).await {
                Ok(Ok(found)) => {
                    let Some(kv) = found.kvs().first() else {
                        return Ok(None);
                    };
                    let number = kv.value_str().ok().and_then(|value| value.parse().ok());
                    let number = number.ok_or_else(|| format!("{key} holds no number"))?;
                    return Ok(Some((number, kv.mod_revision().unsigned_abs())));
                }
                Ok(Err(e)) => why = e.to_string(),
                Err(_) => why = "no answer".into(),
            }
            *client = None;
        }
        if Instant::now() >= deadline {
            return Err(format!("{key} cannot be read: {why}"));
        }
        endpoint += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn verify(target: &Target) -> Result<bool, String> {
    let read = read(&target.record)?;
    let mut client = None;
    let mut lost = 0;
    for (key, known) in &read.keys {
        let found = get(target, &mut client, key).await?;
        if !known.allows(found) {
            lost += 1;
            println!(
                "{key} holds {found:?}, acknowledged was {:?}",
                known.acknowledged
            );
        }
    }
    println!(
        "{} keys, {} acknowledged writes, {lost} keys wrong, longest pause {:.1} s",
        read.keys.len(),
        read.acknowledged,
        read.longest_pause as f64 / 1e3
    );
    Ok(lost == 0 && read.acknowledged > 0)
}

async fn run(command: Command) -> Result<bool, String> {
    match command {
        Command::Write {
            target,
            writers,
            keys,
            pause,
        } => {
            // Above everything that was sent before: a newer number is a newer write.
            let known = read(&target.record).unwrap_or_default();
            let first = known.last + 1;
            let file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(&target.record);
            let file = file.map_err(|e| format!("{}: {e}", target.record.display()))?;
            let (record, target) = (Arc::new(Record(Mutex::new(file))), Arc::new(target));
            let mut tasks = tokio::task::JoinSet::new();
            for writer in 0..writers {
                let pause = Duration::from_millis(pause);
                let (target, record) = (target.clone(), record.clone());
                tasks.spawn(write(target, record, writer, keys, pause, first));
            }
            match tasks.join_next().await {
                Some(Ok(Err(why))) => Err(why),
                _ => Err("a writer ended early".into()),
            }
        }
        Command::Verify { target } => verify(&target).await,
        Command::Read { target } => {
            let mut client = any(&target, 0).await?;
            let read = tokio::time::timeout(ANSWERS_WITHIN, client.get("oracle", None)).await;
            Ok(matches!(read, Ok(Ok(_))))
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse().command).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("holdfast-oracle: {why}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_and_one_that_nobody_made_are_found() {
        let known = Known {
            acknowledged: Some((5, 50)),
            unknown: vec![3, 9],
        };
        // The newest, one after it, and one before it that was applied late.
        for right in [(5, 50), (9, 90), (3, 60)] {
            assert!(known.allows(Some(right)), "{right:?}");
        }
        // Nothing, an acknowledged one of before, nobody's, one that the newest replaced.
        for wrong in [None, Some((1, 10)), Some((7, 70)), Some((3, 30))] {
            assert!(!known.allows(wrong), "{wrong:?}");
        }
        let unknown = Known {
            acknowledged: None,
            unknown: vec![1],
        };
        assert!(unknown.allows(None) && unknown.allows(Some((1, 1))));
        assert!(!unknown.allows(Some((2, 1))));
    }

    #[test]
    fn a_record_that_is_cut_short_is_read() {
        let file = std::env::temp_dir().join(format!("oracle-{}", std::process::id()));
        let lines = "s k 1\na k 1 100 7\ns k 2\na k 2 350 8\ns k 3\na k";
        std::fs::write(&file, lines).unwrap();
        let read = read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!((read.acknowledged, read.longest_pause), (2, 250));
        assert_eq!(read.last, 3);
        assert_eq!(read.keys["k"].acknowledged, Some((2, 8)));
        assert_eq!(read.keys["k"].unknown, [3]);
    }
}
