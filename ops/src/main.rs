//! `holdfast`: the operators' command line, a client of the admin API.

mod archive;
mod args;
mod disaster;
mod drill;
mod init;
mod key;
mod keyfile;
mod objectives;
mod residency;
mod restore;
mod table;
mod tenant;

use std::process::ExitCode;

use args::{Arguments, Command};
use clap::Parser;

#[tokio::main]
async fn main() -> ExitCode {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments = Arguments::parse();
    let ended = match arguments.command {
        Command::Init(init) => init::run(init),
        Command::Keyfile { command } => keyfile::run(command),
        Command::Tenant { command } => tenant::run(&arguments.config, command).await,
        Command::Key { command } => key::run(&arguments.config, command).await,
        Command::Events { tenant } => key::events(&arguments.config, tenant).await,
        Command::Residency { tenant, json } => {
            residency::run(&arguments.config, tenant, json).await
        }
        Command::Certificate { command } => {
            residency::certificate(&arguments.config, command).await
        }
        Command::Archive { command } => archive::run(&arguments.config, command).await,
        Command::Objectives {
            history: Some(tenant),
            json,
        } => objectives::history(&arguments.config, tenant, json).await,
        Command::Objectives {
            history: None,
            json,
        } => objectives::run(&arguments.config, json).await,
        Command::Drill { command } => drill::run(&arguments.config, command).await,
        Command::Node => tenant::node(&arguments.config).await,
        Command::Disaster { command } => disaster::run(&arguments.config, command).await,
        Command::Restore { command } => restore::run(&arguments.config, command).await,
    };
    match ended {
        Ok(code) => code,
        Err(why) => {
            eprintln!("holdfast: {why}");
            ExitCode::FAILURE
        }
    }
}
