//! Names of networks and endpoints.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tidegate_model::validity::{OBJECT_NAME, is_object_name};

/// The name of a network or an endpoint: `name`, or `project/name` for a part of a project.
///
/// Both parts match `[a-zA-Z0-9][a-zA-Z0-9_.-]*` and have at most 63 characters. Clones share the
/// text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Name {
    project: Option<Arc<str>>,
    name: Arc<str>,
}

/// A text that is not a [`Name`], or not a part of one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid name {0:?}: use NAME or PROJECT/NAME, each of 1 to {OBJECT_NAME} letters, digits, \
     dots, hyphens and underscores, with a letter or digit first"
)]
pub struct NameError(pub String);

impl Name {
    /// Creates a name from its parts.
    ///
    /// # Errors
    /// [`NameError`] with the invalid part.
    pub fn new(project: Option<&str>, name: &str) -> Result<Self, NameError> {
        Ok(Self { project: project.map(part).transpose()?, name: part(name)? })
    }

    /// The name of the network for the egress of overlay networks.
    #[must_use]
    pub fn mesh_gateway() -> Self {
        Self { project: None, name: crate::MESH_GATEWAY.into() }
    }

    /// Whether it is [`mesh_gateway`](Self::mesh_gateway).
    #[must_use]
    pub fn is_mesh_gateway(&self) -> bool {
        self.project.is_none() && *self.name == *crate::MESH_GATEWAY
    }

    /// The name of the sandbox of this host on the overlay network `network`, through which
    /// connections to the services on that network pass. No project has its first part.
    #[must_use]
    pub fn sandbox_on(network: &Self) -> Self {
        Self { project: Some(crate::MESH_SANDBOX.into()), name: Arc::clone(&network.name) }
    }

    /// Whether it is that of a sandbox.
    #[must_use]
    pub fn is_sandbox(&self) -> bool {
        self.project.as_deref() == Some(crate::MESH_SANDBOX)
    }

    /// Returns the project, `None` for an object that belongs to no project.
    #[must_use]
    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// Returns the name of the project that it is a part of.
    #[must_use]
    pub fn project_name(&self) -> Option<Self> {
        self.project.clone().map(|name| Self { project: None, name })
    }

    /// Whether it is a part of `project`.
    #[must_use]
    pub fn is_part_of(&self, project: &Self) -> bool {
        project.project.is_none() && self.project.as_ref() == Some(&project.name)
    }

    /// Returns the name within the project.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn part(text: &str) -> Result<Arc<str>, NameError> {
    if is_object_name(text) { Ok(text.into()) } else { Err(NameError(text.to_owned())) }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(project) = &self.project {
            write!(f, "{project}/")?;
        }
        f.write_str(&self.name)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (project, name) = match text.split_once('/') {
            Some((project, name)) => (Some(project), name),
            None => (None, text),
        };
        Self::new(project, name).map_err(|_| NameError(text.to_owned()))
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn valid_names_print_and_parse_back(
            text in "([a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}/)?[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}"
        ) {
            let name: Name = text.parse().unwrap();
            prop_assert_eq!(name.to_string(), text.as_str());
            prop_assert_eq!(Name::new(name.project(), name.name()), Ok(name.clone()));
            let json = serde_json::to_string(&name).unwrap();
            prop_assert_eq!(&json, &format!("{text:?}"));
            prop_assert_eq!(serde_json::from_str::<Name>(&json).unwrap(), name);
        }
    }

    #[test]
    fn invalid_names_are_rejected_with_the_whole_text() {
        let long = "a".repeat(64);
        for text in
            ["", "/", "a/", "/a", "a/b/c", "-a", ".a", "_a", "a b", "a\n", "ä", "p/-a", &long]
        {
            assert_eq!(text.parse::<Name>(), Err(NameError(text.to_owned())), "{text:?}");
            assert!(serde_json::from_str::<Name>(&format!("{text:?}")).is_err());
        }
        assert_eq!(
            "a b".parse::<Name>().unwrap_err().to_string(),
            "invalid name \"a b\": use NAME or PROJECT/NAME, each of 1 to 63 letters, digits, dots, \
             hyphens and underscores, with a letter or digit first"
        );
    }
}
