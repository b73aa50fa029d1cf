//! Parses the section of a service.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::error::{Fault, Site};
use super::ports;
use super::project::{DEFAULT_NETWORK, Run, Service, ServiceNetwork};
use super::value::{Field, Value};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use tidegate_model::Restart;
use tidegate_model::validity::{HOST_NAME, is_alias, is_host_name};

/// Keys that apply only to services with a command.
const KEYS_OF_COMMANDS: [&str; 3] = ["environment", "hostname", "restart"];

/// A service, with the positions of the parts that are checked against other sections.
pub(super) struct Draft {
    pub(super) service: Service,
    /// One per network.
    pub(super) networks: Vec<AttachmentSites>,
    /// One per port.
    pub(super) ports: Vec<Site>,
    /// One per dependency.
    pub(super) depends_on: Vec<Site>,
}

/// The positions of the parts of an [`ServiceNetwork`].
pub(super) struct AttachmentSites {
    pub(super) network: Site,
    pub(super) ipv4_address: Option<Site>,
    pub(super) ipv6_address: Option<Site>,
}

/// Parses the section of a service of a file in `directory`.
pub(super) fn read(section: &Field<'_>, directory: &Path) -> Result<Draft, Fault> {
    let (mut command, mut netns) = (None, None);
    let (mut networks, mut service_ports, mut depends_on) = (Vec::new(), Vec::new(), Vec::new());
    let (mut dns_search, mut dns_options) = (Vec::new(), Vec::new());
    let (mut environment, mut hostname, mut dns, mut restart) =
        (BTreeMap::new(), None, Vec::new(), Restart::default());
    let fields = section.value.fields()?;
    for field in &fields {
        let value = &field.value;
        match field.key {
            "command" => command = Some(read_command(value)?),
            "x-netns" => netns = Some((directory.join(read_path(value)?), &field.site)),
            "environment" => environment = read_environment(value)?,
            "hostname" => hostname = Some(read_hostname(value)?),
            "networks" => networks = read_networks(value)?,
            "ports" => {
                service_ports = if value.is_null() { Vec::new() } else { ports::read(value)? }
            }
            "dns" => dns = addresses(value)?,
            "dns_search" => dns_search = read_words(value)?,
            "dns_opt" => dns_options = read_words(value)?,
            "depends_on" => depends_on = read_dependencies(value)?,
            "restart" => restart = read_restart(value)?,
            _ if field.is_extension() => {}
            key => return Err(field.site.fault(refusal(key))),
        }
    }
    let run = match (command, netns) {
        (Some(command), None) => Run::Command(command),
        (None, Some((path, _))) => {
            if let Some(field) = fields.iter().find(|field| KEYS_OF_COMMANDS.contains(&field.key)) {
                return Err(field
                    .site
                    .fault("x-netns adopts a namespace and runs no command; remove the key"));
            }
            Run::Adopt(path)
        }
        (Some(_), Some((_, site))) => {
            return Err(
                site.fault("command and x-netns are mutually exclusive; remove one of them")
            );
        }
        (None, None) => {
            return Err(section.site.fault(
                "the service has no command; add command, or x-netns to adopt a namespace",
            ));
        }
    };
    if networks.is_empty() {
        let site = section.site.clone();
        let sites = AttachmentSites { network: site, ipv4_address: None, ipv6_address: None };
        networks.push((ServiceNetwork::plain(DEFAULT_NETWORK), sites));
    }
    let (attachments, networks) = networks.into_iter().unzip();
    let (specs, ports) = service_ports.into_iter().unzip();
    let (dependencies, depends_on) = depends_on.into_iter().unzip();
    let service = Service {
        name: section.key.to_owned(),
        run,
        environment,
        hostname,
        networks: attachments,
        ports: specs,
        dns,
        dns_search,
        dns_options,
        depends_on: dependencies,
        restart,
        working_dir: directory.to_owned(),
        place: section.site.place,
    };
    Ok(Draft { service, networks, ports, depends_on })
}

/// Returns the reason why `key` is rejected in a service.
fn refusal(key: &str) -> &'static str {
    match key {
        "image" | "build" | "platform" | "pull_policy" => {
            "tidegate runs services as processes of this host, not images; remove the key and give a command"
        }
        "entrypoint" => {
            "there is no image entry point to override; put the complete command line into command"
        }
        "volumes" | "tmpfs" | "configs" | "secrets" | "read_only" => {
            "services use the file system of this host, so there is nothing to mount; remove the key"
        }
        "env_file" => "environment files are not supported; put the variables under environment",
        "network_mode" => {
            "every service has its own network namespace; remove the key, or adopt a namespace with x-netns"
        }
        "links" | "external_links" => {
            "services resolve each other by name on their networks; remove the key"
        }
        "expose" => "services on a network reach all ports of each other; remove the key",
        "deploy" | "scale" => "a service has exactly one instance; remove the key",
        "healthcheck" => "health checks are not supported; remove the key",
        "container_name" => {
            "a service is named by its key; remove the key, or add an alias to a network"
        }
        _ => {
            "this key is not supported; remove it (supported: command, depends_on, dns, dns_opt, dns_search, environment, \
             hostname, networks, ports, restart, x-netns)"
        }
    }
}

/// One word for resolv.conf(5), or a list of them.
fn read_words(value: &Value<'_>) -> Result<Vec<String>, Fault> {
    let word = |value: &Value<'_>| {
        let word = without_nul(value)?;
        if word.is_empty() || word.contains(char::is_whitespace) {
            return Err(value.fault(format!("{word:?} is not a single word")));
        }
        Ok(word)
    };
    strings(value)?.iter().map(word).collect()
}

/// One address, or a list of them.
pub(super) fn addresses(value: &Value<'_>) -> Result<Vec<IpAddr>, Fault> {
    strings(value)?.iter().map(|address| address.parsed("an IP address")).collect()
}

/// One string, or a list of them.
fn strings<'a>(value: &Value<'a>) -> Result<Vec<Value<'a>>, Fault> {
    if value.is_list() { value.items() } else { Ok(vec![value.clone()]) }
}

fn read_command(value: &Value<'_>) -> Result<Vec<String>, Fault> {
    let words = if value.is_list() {
        value.items()?.iter().map(without_nul).collect::<Result<_, _>>()?
    } else if value.is_null() || value.is_map() {
        return Err(value.expected("a string or a list of strings"));
    } else {
        let text = without_nul(value)?;
        shlex::split(&text)
            .ok_or_else(|| value.fault("unterminated quote, or a trailing backslash"))?
    };
    if words.first().is_none_or(String::is_empty) {
        return Err(value.fault("the command names no program; add one"));
    }
    Ok(words)
}

/// A string that can be passed to a system call.
fn without_nul(value: &Value<'_>) -> Result<String, Fault> {
    let text = value.string()?;
    refuse_nul(value, &text)?;
    Ok(text)
}

fn refuse_nul(value: &Value<'_>, text: &str) -> Result<(), Fault> {
    if text.contains('\0') {
        Err(value.fault("the value contains a NUL character; remove it"))
    } else {
        Ok(())
    }
}

fn read_path(value: &Value<'_>) -> Result<String, Fault> {
    let path = without_nul(value)?;
    if path.is_empty() {
        return Err(value.fault(
            "the path is empty; set the path of a network namespace, for example /run/netns/NAME",
        ));
    }
    Ok(path)
}

/// A map of variables or a list of `NAME=VALUE`. A name without a value passes the variable of this
/// process through, if it is set.
fn read_environment(value: &Value<'_>) -> Result<BTreeMap<String, String>, Fault> {
    let mut environment = BTreeMap::new();
    let mut add = |name: &str, given: Option<String>, at: &Value<'_>, site: &Site| {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(site.fault(format!("{name:?} is not a valid variable name")));
        }
        if environment.contains_key(name) {
            return Err(site.fault(format!("variable {name} is set twice; remove one of them")));
        }
        if let Some(given) = given.or_else(|| at.context().variable(name)) {
            refuse_nul(at, &given)?;
            environment.insert(name.to_owned(), given);
        }
        Ok(())
    };
    if value.is_list() {
        for item in value.items()? {
            let text = item.string()?;
            let (name, given) = match text.split_once('=') {
                Some((name, given)) => (name, Some(given.to_owned())),
                None => (text.as_str(), None),
            };
            add(name, given, &item, item.site())?;
        }
    } else {
        for Field { key, site, value } in value.fields_if_any()? {
            let given = if value.is_null() { None } else { Some(value.scalar()?) };
            add(key, given, &value, &site)?;
        }
    }
    Ok(environment)
}

fn read_hostname(value: &Value<'_>) -> Result<String, Fault> {
    let name = value.string()?;
    if !is_host_name(&name) {
        return Err(value.fault(format!(
            "{name:?} is not a valid host name: use at most {HOST_NAME} letters, digits, hyphens and dots"
        )));
    }
    Ok(name)
}

fn read_networks(value: &Value<'_>) -> Result<Vec<(ServiceNetwork, AttachmentSites)>, Fault> {
    let plain = |network: Site| AttachmentSites { network, ipv4_address: None, ipv6_address: None };
    let mut networks: Vec<(ServiceNetwork, AttachmentSites)> = Vec::new();
    if !value.is_list() {
        for field in value.fields_if_any()? {
            let mut sites = plain(field.site.clone());
            let attachment = read_attachment(&field, &mut sites)?;
            networks.push((attachment, sites));
        }
        return Ok(networks);
    }
    let mut seen = BTreeMap::new();
    for item in value.items()? {
        let name = item.string()?;
        refuse_repetition(&mut seen, &name, &item)?;
        networks.push((ServiceNetwork::plain(&name), plain(item.site().clone())));
    }
    Ok(networks)
}

fn refuse_repetition(
    seen: &mut BTreeMap<String, u64>,
    name: &str,
    item: &Value<'_>,
) -> Result<(), Fault> {
    match seen.insert(name.to_owned(), item.site().place.line) {
        Some(line) => {
            Err(item
                .fault(format!("{name:?} is already listed in line {line}; remove one of them")))
        }
        None => Ok(()),
    }
}

fn read_attachment(
    network: &Field<'_>,
    sites: &mut AttachmentSites,
) -> Result<ServiceNetwork, Fault> {
    let mut attachment = ServiceNetwork::plain(network.key);
    for Field { key, site, value } in network.value.fields_if_any()? {
        match key {
            "aliases" => {
                let aliases = value.items()?;
                attachment.aliases = aliases.iter().map(read_alias).collect::<Result<_, _>>()?;
            }
            "ipv4_address" => {
                attachment.ipv4_address = Some(value.parsed("an IPv4 address")?);
                sites.ipv4_address = Some(value.site().clone());
            }
            "ipv6_address" => {
                attachment.ipv6_address = Some(value.parsed("an IPv6 address")?);
                sites.ipv6_address = Some(value.site().clone());
            }
            "x-any-source" => attachment.any_source = value.boolean()?,
            _ if key.starts_with("x-") => {}
            _ => {
                return Err(site.fault(
                    "this key is not supported; remove it (supported: aliases, ipv4_address, ipv6_address)",
                ));
            }
        }
    }
    Ok(attachment)
}

fn read_alias(value: &Value<'_>) -> Result<String, Fault> {
    let alias = value.string()?;
    if !is_alias(&alias) {
        return Err(value.fault(format!(
            "{alias:?} is not a valid DNS name: use letters, digits, hyphens and underscores, separated by dots"
        )));
    }
    Ok(alias)
}

fn read_dependencies(value: &Value<'_>) -> Result<Vec<(String, Site)>, Fault> {
    if !value.is_list() {
        let fields = value.fields_if_any()?.into_iter();
        return fields
            .map(|field| read_condition(&field).map(|()| (field.key.to_owned(), field.site)))
            .collect();
    }
    let mut seen = BTreeMap::new();
    let mut dependencies = Vec::new();
    for item in value.items()? {
        let name = item.string()?;
        refuse_repetition(&mut seen, &name, &item)?;
        dependencies.push((name, item.site().clone()));
    }
    Ok(dependencies)
}

/// The body of a dependency in a map. The only supported condition is that the other service is
/// started first.
fn read_condition(dependency: &Field<'_>) -> Result<(), Fault> {
    let mut given = false;
    for Field { key, site, value } in dependency.value.fields()? {
        match key {
            "condition" => {
                let condition = value.string()?;
                let why = match condition.as_str() {
                    "service_started" => {
                        given = true;
                        continue;
                    }
                    "service_healthy" => "tidegate runs no health checks",
                    "service_completed_successfully" => {
                        "tidegate does not wait for a service to exit"
                    }
                    _ => "Compose has no such condition",
                };
                return Err(value
                    .fault(format!("{condition:?} is not supported: {why}; use service_started")));
            }
            _ if key.starts_with("x-") => {}
            _ => {
                return Err(
                    site.fault("this key is not supported; remove it (supported: condition)")
                );
            }
        }
    }
    if given {
        Ok(())
    } else {
        Err(dependency.site.fault("no condition is set; add condition: service_started"))
    }
}

fn read_restart(value: &Value<'_>) -> Result<Restart, Fault> {
    let text = value.string()?;
    let counted = || {
        let count = text.strip_prefix("on-failure:")?;
        let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
        count.parse::<u32>().ok().filter(|_| digits)
    };
    match text.as_str() {
        "no" => Ok(Restart::No),
        "always" => Ok(Restart::Always),
        "unless-stopped" => Ok(Restart::UnlessStopped),
        "on-failure" => Ok(Restart::OnFailure { max: None }),
        // Docker treats 0 as no limit.
        _ => counted()
            .map(|max| Restart::OnFailure { max: Some(max).filter(|max| *max > 0) })
            .ok_or_else(|| {
                value.fault(format!(
                    "{text:?} is not no, always, unless-stopped, on-failure or on-failure:TIMES"
                ))
            }),
    }
}
