//! `holdfast key` and `holdfast events`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::admin_client::AdminClient;
use daemon::proto::admin::{
    ChangeKeyRequest, ListEventsRequest, RotateKeyRequest, ShowTenantRequest,
};
use indicatif::{ProgressBar, ProgressStyle};
use replication::clock::utc;
use tonic::transport::Channel;

use crate::args::KeyCommand;
use crate::table;
use crate::tenant::said;

/// How often a task that goes on is looked at.
const LOOK: Duration = Duration::from_millis(300);

pub async fn run(config: &Path, command: KeyCommand) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    match command {
        KeyCommand::Rotate { tenant, rewrite } => {
            let request = RotateKeyRequest {
                name: tenant,
                rewrite,
            };
            let answer = client.rotate_key(request).await.map_err(said)?;
            let tenant = answer.into_inner();
            println!(
                "New writes of {} are sealed under generation {}; what is older stays readable under its own.",
                tenant.name, tenant.generation
            );
            if rewrite {
                rewritten(&mut client, tenant.name).await?;
            }
        }
        KeyCommand::Change { tenant, key } => {
            let request = ChangeKeyRequest { name: tenant, key };
            let answer = client.change_key(request).await.map_err(said)?;
            let tenant = answer.into_inner();
            println!(
                "{} is under key {}, generation {}; the KMS key before it is needed no more.",
                tenant.name, tenant.key, tenant.generation
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows a rewriting to its end.
async fn rewritten(client: &mut AdminClient<Channel>, name: String) -> Result<(), String> {
    let style = ProgressStyle::with_template("{wide_bar} {bytes:>10} of {total_bytes:<10} {msg}");
    let bar = ProgressBar::new(0).with_style(style.map_err(|e| e.to_string())?);
    loop {
        let request = ShowTenantRequest { name: name.clone() };
        let tenant = client.show_tenant(request).await.map_err(|e| {
            format!(
                "{}\nThe rewriting goes on; look with 'holdfast tenant show {name}'.",
                said(e)
            )
        })?;
        let tenant = tenant.into_inner();
        if tenant.key_task.is_empty() {
            bar.finish_and_clear();
            if !tenant.other_generations.is_empty() {
                return Err(format!(
                    "another task took the place of the rewriting: generations {:?} of {name} are still needed",
                    tenant.other_generations
                ));
            }
            println!(
                "Everything of {name} is under generation {}; the generations before it are destroyed.",
                tenant.generation
            );
            return Ok(());
        }
        let reports = &tenant.key_reports;
        let total: u64 = reports.iter().map(|r| r.of_bytes).sum();
        let older: u64 = reports.iter().map(|r| r.older_bytes).sum();
        let entries: u64 = reports.iter().map(|r| r.older_entries).sum();
        bar.set_length(total);
        bar.set_position(total - older.min(total));
        bar.set_message(match (older, entries) {
            (0, 0) => "the archive begins anew".into(),
            (0, entries) => format!("{entries} log entries are left"),
            _ => "files".to_string(),
        });
        tokio::time::sleep(LOOK).await;
    }
}

pub async fn events(config: &Path, tenant: Option<String>) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    let request = ListEventsRequest {
        tenant: tenant.unwrap_or_default(),
    };
    let list = client
        .list_events(request)
        .await
        .map_err(said)?
        .into_inner();
    let rows: Vec<_> = list
        .events
        .into_iter()
        .map(|e| vec![utc(e.at_ms), e.node, e.tenant, e.kind, e.detail])
        .collect();
    table::print(&["TIME", "NODE", "TENANT", "EVENT", "DETAIL"], &rows);
    Ok(ExitCode::SUCCESS)
}
