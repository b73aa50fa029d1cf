//! In which order services start: those that others depend on first. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::ServiceError;
use std::collections::BTreeMap;

/// Each service's level: 0 for one that depends on nothing, else one above the highest it depends
/// on.
///
/// Starting goes up the levels, stopping down; services of one level do not know each other.
pub(super) fn levels(services: &[(&str, &[String])]) -> Result<Vec<usize>, ServiceError> {
    let mut index = BTreeMap::new();
    for (position, (name, _)) in services.iter().enumerate() {
        if index.insert(*name, position).is_some() {
            return Err(ServiceError::Duplicate((*name).to_owned()));
        }
    }
    let mut needs = Vec::with_capacity(services.len());
    for (name, dependencies) in services {
        let known = dependencies.iter().map(|dependency| {
            index.get(dependency.as_str()).copied().ok_or_else(|| ServiceError::UnknownDependency {
                service: (*name).to_owned(),
                dependency: dependency.clone(),
            })
        });
        needs.push(known.collect::<Result<Vec<usize>, _>>()?);
    }
    let mut levels: Vec<Option<usize>> = vec![None; services.len()];
    loop {
        let mut settled = false;
        for position in 0..services.len() {
            if levels[position].is_none() {
                levels[position] = needs[position]
                    .iter()
                    .try_fold(0, |level, &need| Some(level.max(levels[need]? + 1)));
                settled |= levels[position].is_some();
            }
        }
        if !settled {
            break;
        }
    }
    match levels.iter().position(Option::is_none) {
        None => Ok(levels.into_iter().flatten().collect()),
        Some(stuck) => Err(cycle(services, &needs, &levels, stuck)),
    }
}

/// The circle that `stuck` is in or waits for: every service without a level needs another such.
fn cycle(
    services: &[(&str, &[String])],
    needs: &[Vec<usize>],
    levels: &[Option<usize>],
    stuck: usize,
) -> ServiceError {
    let mut way = vec![stuck];
    let mut at = stuck;
    while let Some(&next) = needs[at].iter().find(|&&need| levels[need].is_none()) {
        if let Some(seen) = way.iter().position(|&passed| passed == next) {
            way.drain(..seen);
            way.push(next);
            break;
        }
        way.push(next);
        at = next;
    }
    ServiceError::Cycle(way.into_iter().map(|position| services[position].0.to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(services: &[(&str, &[&str])]) -> Result<Vec<usize>, String> {
        let owned: Vec<(&str, Vec<String>)> = services
            .iter()
            .map(|(name, needs)| (*name, needs.iter().map(|need| (*need).to_owned()).collect()))
            .collect();
        let borrowed: Vec<(&str, &[String])> =
            owned.iter().map(|(name, needs)| (*name, needs.as_slice())).collect();
        levels(&borrowed).map_err(|error| error.to_string())
    }

    #[test]
    fn a_service_is_above_all_that_it_depends_on() {
        let services: &[(&str, &[&str])] = &[
            ("web", &["api", "cache"]),
            ("api", &["db"]),
            ("db", &[]),
            ("cache", &[]),
            ("lone", &[]),
        ];
        assert_eq!(order(services), Ok(vec![2, 1, 0, 0, 0]));
        assert_eq!(order(&[]), Ok(vec![]));
    }

    #[test]
    fn a_circle_is_told_from_where_it_closes() {
        let services: &[(&str, &[&str])] = &[("web", &["api"]), ("api", &["db"]), ("db", &["api"])];
        let told =
            "services depend on each other in a circle: \"api\" -> \"db\" -> \"api\"; break it";
        assert_eq!(order(services), Err(told.to_owned()));
        let itself = "services depend on each other in a circle: \"a\" -> \"a\"; break it";
        assert_eq!(order(&[("a", &["a"])]), Err(itself.to_owned()));
    }

    #[test]
    fn what_is_unknown_or_there_twice_is_named() {
        assert_eq!(
            order(&[("web", &["nosuch"])]),
            Err("service \"web\" depends on \"nosuch\", which is no service here".to_owned())
        );
        assert_eq!(
            order(&[("web", &[]), ("web", &[])]),
            Err("there are two services \"web\"; rename one".to_owned())
        );
    }
}
