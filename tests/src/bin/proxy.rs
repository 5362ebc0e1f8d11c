//! `proxy UPSTREAM FILE`: a proxy before an object store, for the chaos scripts. What it does stands in
//! FILE: `pass`, `refuse STATUS`, `delay MS` or `lose-answers`. Prints where it listens.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use holdfast_tests::proxy::{Mode, Proxy};

const LOOK: Duration = Duration::from_millis(50);

fn mode(text: &str) -> Result<Mode> {
    let words: Vec<&str> = text.split_whitespace().collect();
    Ok(match words[..] {
        ["pass"] => Mode::Pass,
        ["lose-answers"] => Mode::LoseAnswers,
        ["refuse", status] => Mode::Refuse(status.parse()?),
        ["delay", ms] => Mode::Delay(ms.parse()?),
        _ => bail!("\"{text}\" is no mode"),
    })
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let upstream = arguments.next().context("UPSTREAM")?;
    let file = arguments.next().context("FILE")?;
    let proxy = Proxy::start(&upstream).await?;
    println!("{}", proxy.endpoint);
    let mut last = String::new();
    loop {
        // A line that is being written is read again.
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if text != last
            && let Ok(mode) = mode(&text)
        {
            proxy.set(mode);
            last = text;
        }
        tokio::time::sleep(LOOK).await;
    }
}
