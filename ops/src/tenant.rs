//! `holdfast tenant` and `holdfast node`.

use std::path::Path;
use std::process::ExitCode;

use daemon::admin_client::OperatorConfig;
use daemon::proto::admin::{
    CreateTenantRequest, ListTenantsRequest, NodeStatusRequest, ShowTenantRequest, Tenant,
};

use crate::args::{Create, TenantCommand, milliseconds};
use crate::table;

fn said(e: tonic::Status) -> String {
    e.message().to_string()
}

pub async fn run(config: &Path, command: TenantCommand) -> Result<ExitCode, String> {
    let mut client = OperatorConfig::load(config)?.connect().await?;
    match command {
        TenantCommand::Create(create) => {
            let tenant = client
                .create_tenant(request(create)?)
                .await
                .map_err(said)?
                .into_inner();
            println!("Tenant {} is ready: {}", tenant.name, tenant.id);
        }
        TenantCommand::List => {
            let list = client
                .list_tenants(ListTenantsRequest {})
                .await
                .map_err(said)?
                .into_inner();
            let row = |t: &Tenant| {
                let state = if t.problem.is_empty() {
                    "serving"
                } else {
                    &t.problem
                };
                vec![
                    t.name.clone(),
                    t.tier.clone(),
                    table::duration(t.rpo_ms),
                    table::duration(t.actual_rpo_ms),
                    table::duration(t.rto_ms),
                    t.revision.to_string(),
                    state.to_string(),
                ]
            };
            let rows: Vec<_> = list.tenants.iter().map(row).collect();
            table::print(
                &[
                    "TENANT", "TIER", "RPO", "RPO NOW", "RTO", "REVISION", "STATE",
                ],
                &rows,
            );
        }
        TenantCommand::Show { name } => {
            let tenant = client
                .show_tenant(ShowTenantRequest { name })
                .await
                .map_err(said)?
                .into_inner();
            show(&tenant);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn request(create: Create) -> Result<CreateTenantRequest, String> {
    let password = match create.password {
        Some(password) => password,
        None => {
            let mut line = String::new();
            eprint!("Password of {}: ", create.user);
            std::io::stdin()
                .read_line(&mut line)
                .map_err(|e| e.to_string())?;
            line.trim_end_matches('\n').to_string()
        }
    };
    let parse = |text: Option<String>| text.map_or(Ok(0), |text| milliseconds(&text));
    Ok(CreateTenantRequest {
        name: create.name,
        tier: create.tier,
        rpo_ms: parse(create.rpo)?,
        rto_ms: parse(create.rto)?,
        key: create.key,
        user: create.user,
        password,
        quota_bytes: create.quota.unwrap_or(0),
    })
}

fn show(t: &Tenant) {
    let archived = if t.archived >= t.applied {
        "everything".into()
    } else {
        format!("index {} of {}", t.archived, t.applied)
    };
    let rows = [
        ("tenant", t.name.clone()),
        ("id", format!("{}, incarnation {}", t.id, t.incarnation)),
        ("tier", t.tier.clone()),
        ("key", t.key.clone()),
        (
            "replicas",
            format!("{} (leader {})", t.voters.join(", "), t.leader),
        ),
        ("revision", t.revision.to_string()),
        ("bytes", t.bytes.to_string()),
        ("digest", t.digest.clone()),
        ("archived", archived),
        (
            "RPO",
            format!(
                "{} contracted, {} now (seen from {})",
                table::duration(t.rpo_ms),
                table::duration(t.actual_rpo_ms),
                t.node
            ),
        ),
        ("RTO", format!("{} contracted", table::duration(t.rto_ms))),
        ("coverage", t.coverage.clone()),
        ("problem", t.problem.clone()),
    ];
    for (what, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        println!("{what:<10}{value}");
    }
}

pub async fn node(config: &Path) -> Result<ExitCode, String> {
    let operator = OperatorConfig::load(config)?;
    let mut rows = Vec::new();
    let mut serving = true;
    for endpoint in &operator.endpoints {
        let row = match operator.connect_to(*endpoint).await {
            Ok(mut client) => {
                let s = client
                    .node_status(NodeStatusRequest {})
                    .await
                    .map_err(said)?
                    .into_inner();
                serving &= s.state == "serving";
                vec![endpoint.to_string(), s.name, s.region, s.zone, s.state]
            }
            Err(why) => {
                serving = false;
                vec![
                    endpoint.to_string(),
                    String::new(),
                    String::new(),
                    String::new(),
                    why,
                ]
            }
        };
        rows.push(row);
    }
    table::print(&["ADMIN", "NODE", "REGION", "ZONE", "STATE"], &rows);
    Ok(if serving {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
