//! `tidegate daemon`: networks and ports that are added and removed at run time.

use super::UsageError;
use super::instance_options::InstanceOptions;
use crate::instance::Source;
use crate::service_manager::ServiceManager;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// Manage networks, endpoints and published ports over years, in the foreground
///
/// Networks are created with `tidegate network create`, and network namespaces are attached to them
/// with `tidegate attach`. They are stored in a state file, and continue to exist when the daemon
/// ends or is killed; the next daemon takes them over. While no daemon runs, published ports and
/// DNS are not served, and without a firewall containers have no egress. A service manager is
/// notified (NOTIFY_SOCKET), and may pass the socket of the API (LISTEN_FDS).
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate daemon\n  tidegate network create front --subnet 10.9.0.0/24\n  tidegate attach front --netns /run/netns/web --name web -p 8080:80"
)]
pub(super) struct Daemon {
    /// Directory of the state file [default: /var/lib/tidegate; without root
    /// $XDG_STATE_HOME/tidegate or ~/.local/state/tidegate]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    #[command(flatten)]
    options: InstanceOptions,
}

impl Daemon {
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        // SAFETY: only the main thread exists, because no command has started another one, and
        // nothing else uses inherited descriptors above standard error.
        let manager = unsafe { ServiceManager::from_environment() }?;
        let state = match &self.state {
            Some(directory) => directory.clone(),
            None => default_state().ok_or_else(|| {
                UsageError(
                    "no directory for the state: set HOME, XDG_STATE_HOME or --state".to_owned(),
                )
            })?,
        };
        self.options.instance(Source::Daemon { state }, Duration::ZERO)?.run(manager)
    }
}

fn default_state() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/var/lib/tidegate".into());
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let state = variable("XDG_STATE_HOME").map(PathBuf::from);
    let state = state.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".local/state")))?;
    Some(state.join("tidegate"))
}
