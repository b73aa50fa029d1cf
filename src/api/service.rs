//! The status of a service, converted to the types of the API.

use std::time::SystemTime;
use tidegate_api::types::{Exit, Service, State};

pub(super) fn service_of(status: &tidegate_services::Status) -> Service {
    let exit = |exit: tidegate_services::Exit| match exit {
        tidegate_services::Exit::Code(code) => Exit { code: Some(code), signal: None },
        tidegate_services::Exit::Signal(signal) => Exit { code: None, signal: Some(signal) },
    };
    let (state, ended) = match status.state {
        tidegate_services::State::Starting => (State::Starting, None),
        tidegate_services::State::Running => (State::Running, None),
        tidegate_services::State::Restarting(how) => (State::Restarting, Some(exit(how))),
        tidegate_services::State::Ended(how) => (State::Ended, Some(exit(how))),
    };
    Service {
        name: status.name.clone(),
        state,
        pid: status.pid,
        restarts: status.restarts,
        exit: ended,
        since: Some(time(status.since)),
    }
}

pub(super) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_of_a_service_is_reported_with_its_state() {
        let mut status = tidegate_services::Status {
            name: "web".into(),
            pid: None,
            state: tidegate_services::State::Restarting(tidegate_services::Exit::Signal(9)),
            restarts: 2,
            since: SystemTime::UNIX_EPOCH,
        };
        let service = service_of(&status);
        assert_eq!((service.state, service.restarts), (State::Restarting, 2));
        assert_eq!(service.exit, Some(Exit { code: None, signal: Some(9) }));
        assert_eq!(service.since.as_deref(), Some("1970-01-01T00:00:00Z"));
        status.state = tidegate_services::State::Running;
        assert_eq!(service_of(&status).exit, None);
    }
}
