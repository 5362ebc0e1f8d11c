//! `holdfast key` and `holdfast events`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{ChangeKeyRequest, ListEventsRequest, RotateKeyRequest};

use crate::args::KeyCommand;
use crate::table;
use crate::tenant::said;

pub async fn run(config: &Path, command: KeyCommand) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    match command {
        KeyCommand::Rotate { tenant } => {
            let request = RotateKeyRequest { name: tenant };
            let answer = client.rotate_key(request).await.map_err(said)?;
            let tenant = answer.into_inner();
            println!(
                "New writes of {} are sealed under generation {}; what is older stays readable under its own.",
                tenant.name, tenant.generation
            );
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
        .map(|e| vec![table::time(e.at_ms), e.node, e.tenant, e.kind, e.detail])
        .collect();
    table::print(&["TIME", "NODE", "TENANT", "EVENT", "DETAIL"], &rows);
    Ok(ExitCode::SUCCESS)
}
