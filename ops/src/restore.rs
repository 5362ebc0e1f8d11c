//! `holdfast restore`: has an empty node restore the region, or a node take a tenant back to an
//! earlier moment, and shows how it goes.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::admin_client::AdminClient;
use daemon::proto::admin::{
    NodeStatusRequest, Outcome, RestoreEvent, RestoreRegionRequest, RestoreTenantRequest,
    ShowTenantRequest,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::args::RestoreCommand;
use crate::table;

/// How long nodes may take to say that they await a restore.
const READY_WITHIN: Duration = Duration::from_secs(30);

pub async fn run(config: &Path, command: RestoreCommand) -> Result<ExitCode, String> {
    let operator = OperatorConfig::load(config)?;
    match command {
        RestoreCommand::Region { lost_at, at } => {
            let mut client = awaiting(&operator).await?;
            let request = RestoreRegionRequest {
                lost_at_ms: lost_at.map_or(0, |seconds| seconds * 1000),
                at_ms: at.unwrap_or(0),
            };
            show(client.restore_region(request).await).await?.finish()
        }
        RestoreCommand::Tenant {
            name,
            at,
            revision,
            new,
            key,
        } => {
            let mut client = holding(&operator, &name).await?;
            let request = RestoreTenantRequest {
                name,
                at_ms: at.unwrap_or(0),
                revision: revision.unwrap_or(0),
                new_name: new.unwrap_or_default(),
                new_key: key.unwrap_or_default(),
            };
            let screen = show(client.restore_tenant(request).await).await?;
            let said = screen.said.ok_or("the node broke off; its log says why")?;
            println!("\n{said}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Follows a restore to its end.
pub async fn show(
    started: Result<Response<Streaming<RestoreEvent>>, Status>,
) -> Result<Screen, String> {
    let mut events = started.map_err(|e| e.message().to_string())?.into_inner();
    let mut screen = Screen::default();
    while let Some(event) = events
        .message()
        .await
        .map_err(|e| e.message().to_string())?
    {
        screen.show(event);
    }
    Ok(screen)
}

/// A node that holds a replica of the tenant.
pub async fn holding(
    operator: &OperatorConfig,
    name: &str,
) -> Result<AdminClient<Channel>, String> {
    let mut why = String::from("no node answers");
    for endpoint in &operator.endpoints {
        let Ok(mut client) = operator.connect_to(*endpoint).await else {
            continue;
        };
        let request = ShowTenantRequest { name: name.into() };
        let shown = match client.show_tenant(request).await {
            Ok(shown) => shown.into_inner(),
            Err(e) => {
                why = e.message().to_string();
                continue;
            }
        };
        let status = client.node_status(NodeStatusRequest {}).await;
        let status = status.map_err(|e| e.message().to_string())?.into_inner();
        if shown.placement.contains(&status.name) {
            return Ok(client);
        }
        why = format!("none of the nodes {} answers", shown.placement.join(", "));
    }
    Err(why)
}

/// The first node that awaits a restore, or serves a region that was restored in part. It is asked again while nodes are starting.
pub async fn awaiting(operator: &OperatorConfig) -> Result<AdminClient<Channel>, String> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        let mut said = Vec::new();
        for endpoint in &operator.endpoints {
            let mut client = match operator.connect_to(*endpoint).await {
                Ok(client) => client,
                Err(why) => {
                    said.push(format!("{endpoint}: {why}"));
                    continue;
                }
            };
            let status = client.node_status(NodeStatusRequest {}).await;
            let status = status.map_err(|e| e.message().to_string())?.into_inner();
            match status.state.as_str() {
                // A node that serves restores the tenants that are still lost.
                "awaiting restore" | "serving" => return Ok(client),
                state => said.push(format!("{}: {state}", status.name)),
            }
        }
        if Instant::now() >= deadline {
            return Err(format!("no node awaits a restore: {}", said.join("; ")));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// How long it is to a deadline.
fn left(due_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis() as u64;
    match due_ms.checked_sub(now) {
        Some(ms) => format!("due in {}", table::duration(ms)),
        None => "LATE".into(),
    }
}

#[derive(Default)]
pub struct Screen {
    bars: MultiProgress,
    tenants: HashMap<String, ProgressBar>,
    /// When each must serve, milliseconds since 1970.
    deadlines: HashMap<String, u64>,
    done: Vec<(String, Outcome)>,
    refused: Vec<(String, String)>,
    /// What came of a tenant that was taken back.
    pub said: Option<String>,
    /// The signed report of a region's restore.
    pub report: Option<String>,
}

impl Screen {
    fn show(&mut self, event: RestoreEvent) {
        if event.phase == "report" {
            self.report = Some(event.message);
            return;
        }
        let bar = self.tenants.entry(event.tenant.clone()).or_insert_with(|| {
            let bar = self.bars.add(ProgressBar::new(0));
            // The forecast is of the phase that it is in.
            let style = ProgressStyle::with_template(
                "{prefix:16} {msg:24} {bar:24} {pos}/{len}, done in {eta}",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(event.tenant.clone());
            bar
        });
        if event.deadline_ms > 0 {
            self.deadlines
                .insert(event.tenant.clone(), event.deadline_ms);
        }
        let due = self.deadlines.get(&event.tenant);
        bar.set_message(match due {
            Some(due) => format!("{}, {}", event.phase, left(*due)),
            None => event.phase.clone(),
        });
        if event.total > 0 {
            bar.set_length(event.total);
            bar.set_position(event.done);
        }
        match event.phase.as_str() {
            "serving" => {
                bar.finish();
                match event.outcome {
                    Some(outcome) => self.done.push((event.tenant, outcome)),
                    None => self.said = Some(event.message),
                }
            }
            "drilled" => {
                bar.finish();
                self.said = Some(event.message);
            }
            "refused" => {
                bar.abandon();
                self.refused.push((event.tenant, event.message));
            }
            _ => {}
        }
    }

    pub fn finish(mut self) -> Result<ExitCode, String> {
        let row = |(name, o): &(String, Outcome)| {
            vec![
                name.clone(),
                o.tier.clone(),
                table::duration(o.rpo_ms),
                format!("<= {}", table::duration(o.actual_rpo_ms)),
                table::duration(o.rto_ms),
                table::duration(o.actual_rto_ms),
                o.revision.to_string(),
                if o.digest_matches { "yes" } else { "NO" }.to_string(),
            ]
        };
        // As their deadlines come; "enhanced" before "standard".
        self.done
            .sort_by(|(a, x), (b, y)| (&x.tier, x.rto_ms, a).cmp(&(&y.tier, y.rto_ms, b)));
        let rows: Vec<_> = self.done.iter().map(row).collect();
        println!();
        if self.done.is_empty() && self.refused.is_empty() {
            println!("The region serves, and no tenant of it is lost: nothing was restored.");
            return Ok(ExitCode::SUCCESS);
        }
        table::print(
            &[
                "TENANT",
                "TIER",
                "RPO",
                "ACTUAL RPO",
                "RTO",
                "ACTUAL RTO",
                "REVISION",
                "DIGEST MATCHES",
            ],
            &rows,
        );
        println!(
            "Actual RPO is the age of the newest restored write when the region was lost: at most so much is gone."
        );
        for (name, why) in &self.refused {
            println!("\n{name} is NOT restored: {why}");
        }
        Ok(if self.refused.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}
