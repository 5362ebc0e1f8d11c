//! Whether each node serves a tenant, asked with a client of its own.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, GetOptions};

use crate::region::Region;

const LOOK: Duration = Duration::from_millis(50);

/// A tenant's clients, one for each node.
pub struct Served(pub Vec<Client>);

impl Served {
    pub async fn connect(region: &Region, tenant: &str) -> Result<Self> {
        let mut clients = Vec::new();
        for n in 0..region.nodes.len() {
            clients.push(region.client_at(tenant, &[n]).await?);
        }
        Ok(Served(clients))
    }

    /// What each node answers: `None` where the tenant is served.
    pub async fn refusals(&mut self) -> Vec<Option<String>> {
        let mut said = Vec::new();
        for client in &mut self.0 {
            let options = GetOptions::new().with_serializable();
            let answer = client.get("k", Some(options)).await;
            said.push(answer.err().map(|e| e.to_string()));
        }
        said
    }

    /// Waits until each node refuses the tenant as sealed with `reason`; answers when each first did.
    pub async fn sealed(&mut self, reason: &str, within: Duration) -> Result<Took> {
        let sealed = |said: &str| said.contains("is sealed") && said.contains(reason);
        let reached = |said: Option<&str>| said.is_some_and(sealed);
        self.until(reached, reason, within).await
    }

    /// Waits until each node serves the tenant; answers when each first did.
    pub async fn resumed(&mut self, within: Duration) -> Result<Took> {
        self.until(|said| said.is_none(), "served", within).await
    }

    async fn until(
        &mut self,
        reached: impl Fn(Option<&str>) -> bool,
        what: &str,
        within: Duration,
    ) -> Result<Took> {
        let began = Instant::now();
        let mut took = vec![None; self.0.len()];
        loop {
            let said = self.refusals().await;
            for (said, took) in said.iter().zip(&mut took) {
                if took.is_none() && reached(said.as_deref()) {
                    *took = Some(began.elapsed());
                }
            }
            if took.iter().all(Option::is_some) {
                return Ok(Took(took.into_iter().flatten().collect()));
            }
            ensure!(began.elapsed() < within, "not {what}: {said:?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// How long each node took.
pub struct Took(pub Vec<Duration>);

impl Took {
    pub fn last(&self) -> Duration {
        self.0.iter().copied().max().unwrap_or_default()
    }
}

impl std::fmt::Display for Took {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each: Vec<String> = self
            .0
            .iter()
            .map(|took| format!("{:.1} s", took.as_secs_f64()))
            .collect();
        f.write_str(&each.join(", "))
    }
}
