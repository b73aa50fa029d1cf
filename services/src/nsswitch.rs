//! `/etc/nsswitch.conf` of a service: that of the host, with `files` and `dns` as the only sources
//! of host names. Pure.
//!
//! Other modules query daemons of the host (`resolve`, `mymachines`, `sss`, `mdns4_minimal`,
//! `ldap`, `wins`) or its configuration (`myhostname`). The names of a service come from its own
//! `/etc/hosts` and from tidegate, the server in its `/etc/resolv.conf`.

/// The database of host names (nsswitch.conf(5)).
const DATABASE: &str = "hosts";

/// Replaces the line of the `hosts` database in `text`, or adds it.
pub(super) fn with_names_from_dns(text: &str) -> String {
    let line = format!("{DATABASE}: files dns\n");
    let mut changed = String::with_capacity(text.len() + line.len());
    let mut has_line = false;
    for kept in text.lines() {
        if !is_about_hosts(kept) {
            changed.push_str(kept);
            changed.push('\n');
        } else if !std::mem::replace(&mut has_line, true) {
            changed.push_str(&line);
        }
    }
    if !has_line {
        changed.push_str(&line);
    }
    changed
}

fn is_about_hosts(line: &str) -> bool {
    line.split_once(':').is_some_and(|(database, _)| database.trim() == DATABASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_line_is_replaced_and_other_lines_are_kept() {
        let host = "# hosts: of the host\npasswd: files systemd\n \
                    hosts : mymachines resolve [!UNAVAIL=return] files myhostname dns\nnetworks: files\n\
                    hosts: sss";
        let service =
            "# hosts: of the host\npasswd: files systemd\nhosts: files dns\nnetworks: files\n";
        assert_eq!(with_names_from_dns(host), service);
        assert_eq!(with_names_from_dns(service), service);
    }

    #[test]
    fn a_missing_line_is_added() {
        assert_eq!(with_names_from_dns(""), "hosts: files dns\n");
        assert_eq!(with_names_from_dns("passwd: files"), "passwd: files\nhosts: files dns\n");
    }
}
