//! Parses the supported subset of Compose and checks it into a [`Project`].
//!
//! `docs/compose.md` documents the subset for users. Everything outside it is an error and is never
//! ignored. The exceptions are `version` and extensions (`x-anything`), as in Compose itself. Every
//! error names file, line, column and key.
//!
//! | step | module |
//! |---|---|
//! | YAML to a tree with positions, within bounds | `tree` |
//! | a value with its key path: types, variables, errors | `value`, `interpolate` |
//! | sections to values | `network`, `service`, `ports` |
//! | checks across sections | `check` |
//!
//! Only [`load`] does I/O: it reads the file and the variables of this process. The grammar follows
//! the Compose specification. Where the specification is ambiguous, compose-go is the reference.

#![forbid(unsafe_code)]

mod check;
mod error;
mod interpolate;
mod network;
mod ports;
mod project;
mod service;
#[cfg(test)]
mod tests;
mod tree;
mod value;

pub use self::error::ComposeError;
pub use self::project::{
    DEFAULT_NETWORK, Names, NetworkConfig, Position, Project, Run, Service, ServiceNetwork,
    SubnetConfig,
};

use self::error::{Fault, Site};
use self::value::{Context, Field, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Maximum size of a file, in bytes.
pub const MAX_FILE: usize = 1 << 20;

/// Maximum length of the name of a project, a service or a network, in bytes: that of a DNS label
/// (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 63;

/// Reads and checks the file at `path`. Without a `name` key, the project is named after the
/// directory of the file. Variables come from the environment of this process; a value that is not
/// UTF-8 counts as unset.
///
/// # Errors
/// [`ComposeError`] if the file cannot be read, or for the first fault in it.
pub fn load(path: &Path) -> Result<Project, ComposeError> {
    let failed = |cause: io::Error| ComposeError::Read { path: path.to_owned(), cause };
    let absolute = std::path::absolute(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let file = File::open(&absolute).map_err(failed)?;
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > MAX_FILE {
        return Err(ComposeError::TooLarge { path: path.to_owned() });
    }
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let good = String::from_utf8_lossy(bytes.get(..error.valid_up_to()).unwrap_or_default());
        let last = good.rsplit('\n').next().unwrap_or_default();
        let line = good.matches('\n').count() as u64 + 1;
        let place = Position { line, column: last.chars().count() as u64 + 1 };
        Site::new(place, "").fault("invalid UTF-8; save the file as UTF-8").in_file(path)
    })?;
    let directory = absolute.parent().unwrap_or(Path::new("/"));
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let source =
        Source { path, directory, default_name: &name, env: &|name| std::env::var(name).ok() };
    source.parse(text)
}

/// Parses and checks `text` as the content of the file at `path`. Relative paths in it are joined
/// to the directory of `path`. Without a `name` key, the project gets `default_name`, normalised as
/// Compose does. `env` looks up variables.
///
/// # Errors
/// [`ComposeError`] for the first fault.
pub fn parse(
    text: &str,
    path: &Path,
    default_name: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Project, ComposeError> {
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Source { path, directory, default_name, env }.parse(text)
}

/// A Compose file apart from its text.
struct Source<'a> {
    /// The path as the user gave it.
    path: &'a Path,
    directory: &'a Path,
    default_name: &'a str,
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl Source<'_> {
    fn parse(&self, text: &str) -> Result<Project, ComposeError> {
        if text.len() > MAX_FILE {
            return Err(ComposeError::TooLarge { path: PathBuf::from(self.path) });
        }
        let context = Context::new(self.env);
        let mut project = self.read(text, &context).map_err(|fault| fault.in_file(self.path))?;
        project.warnings =
            context.warnings().iter().map(|warning| warning.line(self.path)).collect();
        Ok(project)
    }

    fn read(&self, text: &str, context: &Context<'_>) -> Result<Project, Fault> {
        let no_services = || Site::start().at_key("services", Position::START).fault(NO_SERVICES);
        let root = tree::read(text)?.ok_or_else(no_services)?;
        let (mut name, mut networks, mut services) = (None, BTreeMap::new(), None);
        for field in Value::root(&root, context).fields_if_any()? {
            match field.key {
                "name" => name = Some(project_name(&field.value)?),
                "networks" => networks = read_networks(&field.value)?,
                "services" => services = Some(self.read_services(&field)?),
                "version" => {}
                _ if field.is_extension() => {}
                _ => {
                    return Err(field.site.fault(
                        "this section is not supported; remove it (supported: name, networks, services, x-*)",
                    ));
                }
            }
        }
        let services = services.ok_or_else(no_services)?;
        settle_default_network(&mut networks, &services);
        check::networks(&networks)?;
        check::attachments(&services, &networks)?;
        check::ports(&services)?;
        check::dependencies(&services)?;
        Ok(Project {
            name: name.map_or_else(|| default_project_name(self.default_name), Ok)?,
            networks: networks.into_iter().map(|(name, draft)| (name, draft.network)).collect(),
            services: services.into_iter().map(|draft| draft.service).collect(),
            warnings: Vec::new(),
        })
    }

    fn read_services(&self, section: &Field<'_>) -> Result<Vec<service::Draft>, Fault> {
        let fields = section.value.fields_if_any()?;
        if fields.is_empty() {
            return Err(section.site.fault(NO_SERVICES));
        }
        fields
            .iter()
            .map(|field| check_name(field).and_then(|()| service::read(field, self.directory)))
            .collect()
    }
}

const NO_SERVICES: &str = "no services are defined; add at least one with a command";

fn read_networks(section: &Value<'_>) -> Result<BTreeMap<String, network::Draft>, Fault> {
    let fields = section.fields_if_any()?;
    let read = |field: &Field<'_>| Ok((field.key.to_owned(), network::read(field)?));
    fields.iter().map(|field| check_name(field).and_then(|()| read(field))).collect()
}

/// Checks a name against the pattern of Compose for services and networks.
fn check_name(field: &Field<'_>) -> Result<(), Fault> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if (1..=MAX_NAME).contains(&field.key.len()) && field.key.bytes().all(allowed) {
        return Ok(());
    }
    Err(field.site.fault(format!(
        "a name consists of 1 to {MAX_NAME} letters, digits, dots, underscores and hyphens; choose another"
    )))
}

fn project_name(value: &Value<'_>) -> Result<String, Fault> {
    let name = value.string()?;
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'-')
    };
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= MAX_NAME && name.bytes().all(allowed) {
        return Ok(name);
    }
    Err(value.fault(format!(
        "{name:?} is not a valid project name: use 1 to {MAX_NAME} lower-case letters, digits, underscores and hyphens, \
         starting with a letter or digit"
    )))
}

/// Derives a project name from the name of a directory, as Compose does.
fn default_project_name(name: &str) -> Result<String, Fault> {
    let allowed = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-');
    let name: String = name.to_lowercase().chars().filter(allowed).collect();
    let name: String = name.trim_start_matches(['_', '-']).chars().take(MAX_NAME).collect();
    if name.is_empty() {
        let site = Site::start().at_key("name", Position::START);
        return Err(site.fault(
            "no project name can be derived from the directory; set one, for example name: shop",
        ));
    }
    Ok(name)
}

/// Adds the default network if a service uses it, and removes it otherwise, even if the file has a
/// section for it.
fn settle_default_network(
    networks: &mut BTreeMap<String, network::Draft>,
    services: &[service::Draft],
) {
    let on_it = |draft: &&service::Draft| {
        draft.service.networks.iter().any(|attachment| attachment.network == DEFAULT_NETWORK)
    };
    match services.iter().find(on_it) {
        None => drop(networks.remove(DEFAULT_NETWORK)),
        Some(first) => {
            networks.entry(DEFAULT_NETWORK.to_owned()).or_insert_with(|| {
                network::Draft::plain(NetworkConfig::plain(DEFAULT_NETWORK, first.service.place))
            });
        }
    }
}
