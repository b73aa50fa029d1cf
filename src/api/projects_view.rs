//! The projects of a daemon, and orders to the task that runs them.

use super::problem::Problem;
use super::reserve::Reserved;
use super::service::service_of;
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_api::types;
use tidegate_control::{self as control, Name, ProjectSpec};
use tidegate_services::LogStream;
use tokio::sync::{mpsc, oneshot, watch};

/// An order to the task that runs projects.
#[derive(Debug)]
pub(crate) enum ProjectOrder {
    /// Create the project and start its services.
    Up {
        /// The project. Endpoints of services with a command have an empty path of their namespace.
        spec: ProjectSpec,
        /// The sockets of its ports.
        reserved: Reserved,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Stop the services of the project and remove it.
    Down {
        /// The project.
        project: Name,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Read the output of its services.
    Logs {
        /// The project.
        project: Name,
        /// Only this service.
        service: Option<String>,
        /// Number of lines that were written before.
        tail: usize,
        /// Also lines that are written from now on.
        follow: bool,
        /// Receives the result.
        done: oneshot::Sender<Result<LogStream, Problem>>,
    },
}

/// The running services of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Supervised {
    /// Process ID of the supervisor process.
    pub(crate) pid: u32,
    /// The services of the project.
    pub(crate) statuses: Vec<tidegate_services::Status>,
}

/// The projects of a daemon.
pub(crate) struct ProjectsView {
    /// The state of the daemon.
    pub(crate) state: watch::Receiver<Arc<control::State>>,
    /// The running services of each project.
    pub(crate) supervised: watch::Receiver<Arc<BTreeMap<Name, Supervised>>>,
    /// The channel to the task that runs projects.
    pub(crate) orders: mpsc::Sender<ProjectOrder>,
}

impl ProjectsView {
    /// Returns the service whose endpoint is `name`, if it has a command.
    pub(super) fn service(&self, name: &str) -> Option<types::Service> {
        let name: Name = name.parse().ok()?;
        let project = name.project_name()?;
        let supervised = self.supervised.borrow();
        let status = supervised.get(&project)?.statuses.iter().find(|one| one.name == name.name());
        Some(types::Service { name: name.to_string(), ..service_of(status?) })
    }

    /// Whether a project runs a command in the endpoint `name`.
    pub(super) fn runs(&self, name: &str) -> bool {
        let Ok(name) = name.parse::<Name>() else { return false };
        let Some(project) = name.project_name() else { return false };
        let state = self.state.borrow();
        let project = state.projects().get(&project);
        project.is_some_and(|one| one.services.iter().any(|service| service.name == name.name()))
    }

    /// Returns the names of all projects.
    pub(super) fn names(&self) -> Vec<String> {
        self.state.borrow().projects().keys().map(Name::to_string).collect()
    }
}
