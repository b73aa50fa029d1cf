//! Help, version and completion.

use super::*;

#[test]
fn the_help_describes_every_flag() {
    let host = Namespace::new();
    let help = succeeds(tidegate(&host, "publish --help"));
    let short = succeeds(tidegate(&host, "publish -h"));
    let cli = tidegate::cli::Cli::command();
    let publish = cli.find_subcommand("publish").unwrap();
    let mut seen = 0;
    let is_shown = |argument: &&clap::Arg| !argument.is_positional() && !argument.is_hide_set();
    for argument in publish.get_arguments().filter(is_shown) {
        let long = format!("--{}", argument.get_long().unwrap());
        assert!(help.contains(&long) && short.contains(&long), "{long} is not in the help");
        assert!(
            argument.get_help().is_some_and(|help| help.to_string().len() > 10),
            "{long} has no description"
        );
        seen += 1;
    }
    assert!(seen >= 15, "{seen} flags");
    for word in ["SPEC", "IPv6", "sctp", "SIGTERM", "Examples:"] {
        // SCTP is not supported yet.
        assert_eq!(help.contains(word), word != "sctp", "{word}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 100), "a line of the help is too long");
}

#[test]
fn help_version_and_completion_work_for_an_ordinary_user() {
    let host = Namespace::new();
    let program = Unprivileged::new();
    assert!(succeeds(program.command(&host, "--version")).starts_with("tidegate "));
    assert!(succeeds(program.command(&host, "--help")).contains("publish"));
    let script = succeeds(program.command(&host, "completion bash"));
    assert!(script.contains("--udp-idle-timeout"));
    // The script is valid for the shell.
    let mut shell = Command::new("bash");
    shell.args(["-n", "-c", &script]);
    succeeds(shell);
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(!succeeds(program.command(&host, &format!("completion {shell}"))).is_empty());
    }
    fails(program.command(&host, "completion tcsh"), 2);
    fails(program.command(&host, ""), 2);
    fails(program.command(&host, "no-such-command"), 2);
}

#[test]
fn a_log_outside_of_a_terminal_has_no_colours() {
    let net = Topology::three();
    let publisher = Publisher::start_with(&net.host, "8080:80 --to 172.30.0.2", |command| {
        command.env("TIDEGATE_LOG", "debug");
    });
    connect_and_see(&net.client, (addr::HOST_V4, 8080).into()).unwrap_err();
    let line = publisher.process.wait_for_line("DEBUG", TIMEOUT);
    assert!(!line.contains('\u{1b}'), "{line:?}");
}

#[test]
fn an_invalid_log_filter_is_an_error() {
    let host = Namespace::new();
    let mut command = tidegate(&host, "publish 8080:80 --to 172.30.0.2");
    command.env("TIDEGATE_LOG", "=====");
    let stderr = fails(command, 1);
    assert_one_line(&stderr);
    assert!(stderr.contains("TIDEGATE_LOG"), "{stderr}");
}
