//! `holdfast keyfile`: keys of the `local` provider.

use std::process::ExitCode;

use kms::local::{KeyState, Keyfile};

use crate::args::KeyfileCommand;

pub fn run(command: KeyfileCommand) -> Result<ExitCode, String> {
    let done = match command {
        KeyfileCommand::Add { file, name } => Keyfile::new(file).add(&name),
        KeyfileCommand::Enable { file, name } => {
            Keyfile::new(file).set_state(&name, KeyState::Enabled)
        }
        KeyfileCommand::Disable { file, name } => {
            Keyfile::new(file).set_state(&name, KeyState::Disabled)
        }
        KeyfileCommand::ScheduleDeletion { file, name } => {
            Keyfile::new(file).set_state(&name, KeyState::PendingDeletion)
        }
    };
    done.map(|()| ExitCode::SUCCESS).map_err(|e| e.to_string())
}
