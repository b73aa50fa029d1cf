//! `tidegate events`: changes of the running instances, as they happen.

use super::event_loop;
use super::object_name::checked;
use super::ps::state;
use clap::Args;
use std::io::Write;
use tidegate_api::client::Client;
use tidegate_api::types::{Change, Event, ObjectKind};

/// Print changes of networks, endpoints, ports, projects and services as they happen
///
/// Prints those of the daemon, or of the only project in the foreground, until that instance ends.
/// Changes that follow each other within some milliseconds may be combined.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate events\n  tidegate events --json | jq -r 'select(.kind == \"service\") | .name'"
)]
pub(super) struct Events {
    /// Only of this project in the foreground; "daemon" for the daemon with all its projects
    #[arg(value_name = "PROJECT")]
    project: Option<String>,

    /// Begin with the objects that exist
    #[arg(long)]
    initial: bool,

    /// Print JSON: an object per line, in the format of the API
    #[arg(long)]
    json: bool,
}

impl Events {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let client = match &self.project {
            Some(project) => Client::of(checked(project)?)?,
            None => Client::new()?,
        };
        let target = format!("/v1/events?initial={}", self.initial);
        let printed = client.lines(&target, |event: Event| {
            let line = if self.json { serde_json::to_string(&event)? } else { line_of(&event) };
            writeln!(std::io::stdout(), "{line}")?;
            anyhow::Ok(())
        });
        match event_loop()?.block_on(printed) {
            Err(error) if super::output::is_broken_pipe(&error) => Ok(()),
            result => result,
        }
    }
}

/// `2026-01-31T12:00:00.000Z service shop/web changed: running`.
fn line_of(event: &Event) -> String {
    let kind = match event.kind {
        ObjectKind::Network => "network",
        ObjectKind::Endpoint => "endpoint",
        ObjectKind::Port => "port",
        ObjectKind::Project => "project",
        ObjectKind::Service => "service",
    };
    let change = match event.change {
        Change::Added => "added",
        Change::Removed => "removed",
        Change::Changed => "changed",
    };
    let service = event.service.as_ref().filter(|_| event.change != Change::Removed);
    let state = service.map(|service| format!(": {}", state(service))).unwrap_or_default();
    format!("{} {kind} {} {change}{state}", event.time, event.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::types::{Service, State};

    #[test]
    fn an_event_is_one_line_with_the_state_of_a_service() {
        let name = "shop/web".to_owned();
        let service = Service {
            name: name.clone(),
            state: State::Running,
            pid: Some(1),
            restarts: 1,
            exit: None,
            since: None,
        };
        let mut event = Event {
            time: "2026-01-31T12:00:00.000Z".to_owned(),
            change: Change::Changed,
            kind: ObjectKind::Service,
            name,
            service: Some(service),
        };
        assert_eq!(
            line_of(&event),
            "2026-01-31T12:00:00.000Z service shop/web changed: running (restarted once)"
        );
        (event.change, event.kind) = (Change::Removed, ObjectKind::Port);
        assert_eq!(line_of(&event), "2026-01-31T12:00:00.000Z port shop/web removed");
    }
}
