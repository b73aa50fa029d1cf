//! Reads one service of a Compose file.

use super::error::{Fault, Site};
use super::ports;
use super::project::{Attachment, DEFAULT_NETWORK, Restart, Run, Service};
use super::value::{Field, Value};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

/// What `sethostname` takes: `__NEW_UTS_LEN`.
const HOST_NAME: usize = 64;

/// What a label of a name in DNS may have: RFC 1035, section 2.3.4.
const LABEL: usize = 63;

/// What a name in DNS may have, as text.
const DOMAIN_NAME: usize = 253;

/// Keys that only mean something where a command is run.
const KEYS_OF_COMMANDS: [&str; 3] = ["environment", "hostname", "restart"];

/// A service, and where the parts stand that are compared with those of others.
pub(super) struct Draft {
    pub(super) service: Service,
    /// As many as there are networks.
    pub(super) networks: Vec<AttachmentSites>,
    /// As many as there are ports.
    pub(super) ports: Vec<Site>,
    /// As many as there are dependencies.
    pub(super) depends_on: Vec<Site>,
}

/// Where the parts of an [`Attachment`] stand.
pub(super) struct AttachmentSites {
    pub(super) network: Site,
    pub(super) ipv4_address: Option<Site>,
    pub(super) ipv6_address: Option<Site>,
}

/// Reads the section of a service of a file in `directory`.
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
                    .fault("nothing is run where x-netns adopts a namespace; remove the key"));
            }
            Run::Adopt(path)
        }
        (Some(_), Some((_, site))) => {
            return Err(site.fault(
                "a service has a command or adopts a namespace, not both; remove one of them",
            ));
        }
        (None, None) => {
            return Err(section.site.fault(
                "there is nothing to run; give a command, or x-netns to adopt a namespace",
            ));
        }
    };
    if networks.is_empty() {
        let site = section.site.clone();
        let sites = AttachmentSites { network: site, ipv4_address: None, ipv6_address: None };
        networks.push((Attachment::plain(DEFAULT_NETWORK), sites));
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

/// Why a service cannot have `key`.
fn refusal(key: &str) -> &'static str {
    match key {
        "image" | "build" | "platform" | "pull_policy" => {
            "tidegate runs services as processes of this host, not images; remove the key and give a command"
        }
        "entrypoint" => {
            "there is no image whose entry point to replace; put the whole of it into command"
        }
        "volumes" | "tmpfs" | "configs" | "secrets" | "read_only" => {
            "services see the files of this host, there is nothing to mount; remove the key"
        }
        "env_file" => "files of variables are not read; put the variables into environment",
        "network_mode" => {
            "every service has a namespace of its own; remove the key, or adopt a namespace with x-netns"
        }
        "links" | "external_links" => {
            "services find the others on their networks by name; remove the key"
        }
        "expose" => "services reach every port of the others on their networks; remove the key",
        "deploy" | "scale" => "a service runs once; remove the key",
        "healthcheck" => "services are not checked for health; remove the key",
        "container_name" => {
            "services have no name but their key; remove the key, or add an alias to a network"
        }
        _ => {
            "this key is not supported; remove it (a service takes command, depends_on, dns, dns_opt, dns_search, environment, \
             hostname, networks, ports, restart and x-netns)"
        }
    }
}

/// One word of resolv.conf(5), or a list of them.
fn read_words(value: &Value<'_>) -> Result<Vec<String>, Fault> {
    let word = |value: &Value<'_>| {
        let word = without_nul(value)?;
        if word.is_empty() || word.contains(char::is_whitespace) {
            return Err(value.fault(format!("{word:?} is not one word")));
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
        shlex::split(&text).ok_or_else(|| {
            value.fault("a quote is not closed, or nothing follows a final backslash")
        })?
    };
    if words.first().is_none_or(String::is_empty) {
        return Err(value.fault("there is no program in the command; name one"));
    }
    Ok(words)
}

/// A string that a system call can take.
fn without_nul(value: &Value<'_>) -> Result<String, Fault> {
    let text = value.string()?;
    refuse_nul(value, &text)?;
    Ok(text)
}

fn refuse_nul(value: &Value<'_>, text: &str) -> Result<(), Fault> {
    if text.contains('\0') {
        Err(value.fault("this holds a NUL character, which no process can be given"))
    } else {
        Ok(())
    }
}

fn read_path(value: &Value<'_>) -> Result<String, Fault> {
    let path = without_nul(value)?;
    if path.is_empty() {
        return Err(value.fault(
            "there is no path; give that of a network namespace, as /run/netns/NAME is one",
        ));
    }
    Ok(path)
}

/// A map of variables or a list of `NAME=VALUE`. A name alone passes on what we have ourselves, if
/// we have it.
fn read_environment(value: &Value<'_>) -> Result<BTreeMap<String, String>, Fault> {
    let mut environment = BTreeMap::new();
    let mut add = |name: &str, given: Option<String>, at: &Value<'_>, site: &Site| {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(site.fault(format!("{name:?} cannot be the name of a variable")));
        }
        if environment.contains_key(name) {
            return Err(site.fault(format!("variable {name} is given twice; remove one of them")));
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
    let allowed = |label: &str| {
        (1..=LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > HOST_NAME || !name.split('.').all(allowed) {
        return Err(value.fault(format!(
            "{name:?} cannot be a host name: letters, digits, hyphens and dots, {HOST_NAME} characters at most"
        )));
    }
    Ok(name)
}

fn read_networks(value: &Value<'_>) -> Result<Vec<(Attachment, AttachmentSites)>, Fault> {
    let plain = |network: Site| AttachmentSites { network, ipv4_address: None, ipv6_address: None };
    let mut networks: Vec<(Attachment, AttachmentSites)> = Vec::new();
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
        networks.push((Attachment::plain(&name), plain(item.site().clone())));
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
            Err(item.fault(format!("{name:?} stands in line {line} already; remove one of them")))
        }
        None => Ok(()),
    }
}

fn read_attachment(network: &Field<'_>, sites: &mut AttachmentSites) -> Result<Attachment, Fault> {
    let mut attachment = Attachment::plain(network.key);
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
                    "this key is not supported; remove it (a network of a service takes aliases, ipv4_address and \
                     ipv6_address)",
                ));
            }
        }
    }
    Ok(attachment)
}

fn read_alias(value: &Value<'_>) -> Result<String, Fault> {
    let alias = value.string()?;
    let allowed = |label: &str| {
        (1..=LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    if alias.len() > DOMAIN_NAME || !alias.split('.').all(allowed) {
        return Err(value.fault(format!(
            "{alias:?} cannot be a name in DNS: letters, digits, hyphens, underscores, and dots between them"
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

/// The body of a dependency in a map, which can only say that the other is to be started first.
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
                    "service_healthy" => "services are not checked for health",
                    "service_completed_successfully" => {
                        "services are started in order, not waited for to end"
                    }
                    _ => "Compose has no such condition",
                };
                return Err(value
                    .fault(format!("{condition:?} is not supported: {why}; say service_started")));
            }
            _ if key.starts_with("x-") => {}
            _ => {
                return Err(site
                    .fault("this key is not supported; remove it (a dependency takes condition)"));
            }
        }
    }
    if given {
        Ok(())
    } else {
        Err(dependency.site.fault("there is no condition; say condition: service_started"))
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
        // Docker takes 0 for no limit.
        _ => counted()
            .map(|max| Restart::OnFailure { max: Some(max).filter(|max| *max > 0) })
            .ok_or_else(|| {
                value.fault(format!(
                    "{text:?} is not no, always, unless-stopped, on-failure or on-failure:TIMES"
                ))
            }),
    }
}
