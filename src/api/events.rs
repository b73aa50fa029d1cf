//! Changes of an instance as a stream of events.
//!
//! Events are the differences of two snapshots. A client that reads slowly therefore gets fewer
//! events, each from an older to the current state, and takes no memory.

use super::json_lines::json_lines;
use super::long_running::LongRunning;
use super::problem::Problem;
use super::projects_view::ProjectsView;
use super::view::View;
use axum::Extension;
use axum::extract::{Query, State};
use axum::response::Response;
use futures_util::stream::unfold;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;
use tidegate_api::types::{Change, ErrorBody, Event, ObjectKind, Service};

/// The objects of an instance, by kind and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Snapshot(BTreeMap<(ObjectKind, String), Option<Service>>);

impl Snapshot {
    fn of(view: &View) -> Self {
        let named = |kind: ObjectKind| move |name: String| ((kind, name), None);
        let networks = view.networks().into_iter().map(|one| one.name);
        let endpoints = view.endpoints().into_iter().map(|one| one.name);
        let ports = view.ports().into_iter().map(|one| one.publish);
        let services = view.status().services.into_iter();
        let projects = view.projects.as_ref().map(ProjectsView::names).unwrap_or_default();
        let plain = networks
            .map(named(ObjectKind::Network))
            .chain(endpoints.map(named(ObjectKind::Endpoint)))
            .chain(ports.map(named(ObjectKind::Port)))
            .chain(projects.into_iter().map(named(ObjectKind::Project)));
        let services = services.map(|one| ((ObjectKind::Service, one.name.clone()), Some(one)));
        Self(plain.chain(services).collect())
    }

    /// Returns the events from `self` to `new`: removed objects first, in the reverse order of
    /// kinds.
    fn events_to(&self, new: &Self, time: &str) -> Vec<Event> {
        let event =
            |change, (kind, name): &(ObjectKind, String), service: &Option<Service>| Event {
                time: time.to_owned(),
                change,
                kind: *kind,
                name: name.clone(),
                service: service.clone(),
            };
        let removed = self.0.iter().rev().filter(|(key, _)| !new.0.contains_key(*key));
        let removed = removed.map(|(key, service)| event(Change::Removed, key, service));
        let others = new.0.iter().filter_map(|(key, service)| match self.0.get(key) {
            None => Some(event(Change::Added, key, service)),
            Some(before) if before != service => Some(event(Change::Changed, key, service)),
            Some(_) => None,
        });
        removed.chain(others).collect()
    }
}

/// The query of [`events`].
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Begin with an event for each existing object.
    #[serde(default)]
    initial: bool,
}

/// Changes of networks, endpoints, ports, projects and services, as they happen
///
/// A sequence of JSON objects, one per line. Changes that follow each other faster than the client
/// reads are combined.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventsQuery),
    responses(
        (status = 200, body = Event, content_type = "application/x-ndjson"),
        (status = 409, body = ErrorBody, description = "Too many clients follow events or logs.")
    )
)]
pub(super) async fn events(
    State(view): State<Arc<View>>,
    Extension(connection): Extension<LongRunning>,
    Query(query): Query<EventsQuery>,
) -> Result<Response, Problem> {
    connection.lift()?;
    // Subscribed before the first snapshot, so that no change is missed.
    let changes = view.changes();
    let before = if query.initial { Snapshot::default() } else { Snapshot::of(&view) };
    let stream = unfold((view, changes, before), async |(view, mut changes, before)| {
        loop {
            let now = Snapshot::of(&view);
            let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
            let events = before.events_to(&now, &time);
            if !events.is_empty() {
                return Some((events, (view, changes, now)));
            }
            changes.next().await?;
        }
    });
    Ok(json_lines(stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::types::State;

    fn service(state: State) -> Option<Service> {
        let name = "web".to_owned();
        Some(Service { name, state, pid: None, restarts: 0, exit: None, since: None })
    }

    #[test]
    fn events_are_the_differences_of_two_snapshots() {
        let of = |objects: &[(ObjectKind, &str, Option<Service>)]| {
            let object = |(kind, name, service): &(ObjectKind, &str, Option<Service>)| {
                ((*kind, (*name).to_owned()), service.clone())
            };
            Snapshot(objects.iter().map(object).collect())
        };
        let old = of(&[
            (ObjectKind::Network, "front", None),
            (ObjectKind::Endpoint, "db", None),
            (ObjectKind::Service, "web", service(State::Starting)),
        ]);
        let new = of(&[
            (ObjectKind::Network, "back", None),
            (ObjectKind::Service, "web", service(State::Running)),
        ]);
        let events = old.events_to(&new, "now");
        let told: Vec<_> =
            events.iter().map(|one| (one.change, one.kind, one.name.as_str())).collect();
        assert_eq!(
            told,
            [
                (Change::Removed, ObjectKind::Endpoint, "db"),
                (Change::Removed, ObjectKind::Network, "front"),
                (Change::Added, ObjectKind::Network, "back"),
                (Change::Changed, ObjectKind::Service, "web"),
            ]
        );
        assert_eq!(events[3].service, service(State::Running));
        assert_eq!(new.events_to(&new, "now"), []);
    }
}
