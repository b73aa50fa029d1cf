//! Start order of services by their dependencies. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::ServiceError;
use std::collections::BTreeMap;

/// Returns the level of each service: 0 without dependencies, else one above the highest level of
/// its dependencies.
///
/// Services start in ascending order of their levels and stop in descending order. Services of the
/// same level do not depend on each other.
///
/// # Errors
/// [`ServiceError::Duplicate`], [`ServiceError::UnknownDependency`] or [`ServiceError::Cycle`].
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

/// Returns the cycle that `stuck` is part of or depends on. It exists, because every service
/// without a level depends on another one without a level.
fn cycle(
    services: &[(&str, &[String])],
    needs: &[Vec<usize>],
    levels: &[Option<usize>],
    stuck: usize,
) -> ServiceError {
    let mut path = vec![stuck];
    let mut at = stuck;
    while let Some(&next) = needs[at].iter().find(|&&need| levels[need].is_none()) {
        if let Some(seen) = path.iter().position(|&passed| passed == next) {
            path.drain(..seen);
            path.push(next);
            break;
        }
        path.push(next);
        at = next;
    }
    ServiceError::Cycle(path.into_iter().map(|position| services[position].0.to_owned()).collect())
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
    fn a_service_is_one_level_above_its_dependencies() {
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
    fn a_cycle_error_lists_only_services_of_the_cycle() {
        let services: &[(&str, &[&str])] = &[("web", &["api"]), ("api", &["db"]), ("db", &["api"])];
        let error = "dependency cycle between services: \"api\" -> \"db\" -> \"api\"; remove one of these dependencies";
        assert_eq!(order(services), Err(error.to_owned()));
        let itself =
            "dependency cycle between services: \"a\" -> \"a\"; remove one of these dependencies";
        assert_eq!(order(&[("a", &["a"])]), Err(itself.to_owned()));
    }

    #[test]
    fn unknown_and_duplicate_services_are_rejected() {
        assert_eq!(
            order(&[("web", &["nosuch"])]),
            Err("service \"web\" depends on \"nosuch\", which does not exist; add it, or remove the dependency".to_owned())
        );
        assert_eq!(
            order(&[("web", &[]), ("web", &[])]),
            Err("there are two services \"web\"; rename one".to_owned())
        );
    }
}
