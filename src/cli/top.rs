//! `tidegate top`: live rates.

use super::duration::timeout;
use super::object_name::checked;
use super::output::print;
use super::{UsageError, event_loop};
use crate::top::{Order, Rates, State, View, frame, screen};
use anyhow::Context;
use clap::Args;
use std::io::{self, IsTerminal};
use std::time::Duration;
use tidegate_api::client::Client;

/// The bounds of the sampling interval.
const INTERVALS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(3600)];

/// Show live rates of tidegate up: ports, endpoints, networks and name servers
///
/// Queries the daemon, or the only project in the foreground; TIDEGATE_SOCKET selects another
/// socket. Exits with 1 if no instance is running. On a terminal of at least 80 columns and 12
/// lines, it runs until q, Esc or Ctrl-C. With --once it prints one frame as text and needs no
/// terminal.
#[derive(Debug, Args)]
#[command(
    after_help = "Keys:\n  Tab, arrows       next or previous view\n  1-4               select a view\n  s, S, r           sort by the next or the previous column; reverse the order\n  /                 filter by a text in any name; Esc removes the filter\n  arrows, pages     scroll\n  q, Esc, Ctrl-C    quit\n\nExamples:\n  tidegate top --interval 1s --sort in\n  tidegate top --once --filter web\n  tidegate top --once --json | jq '.ports[] | {publish, bytes_out_rate}'"
)]
pub(super) struct Top {
    /// This project, if several are up; "daemon" for the daemon
    #[arg(value_name = "PROJECT")]
    project: Option<String>,

    /// Sampling interval
    #[arg(short, long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    interval: Duration,

    /// The first view
    #[arg(long, value_name = "VIEW", value_enum, default_value_t)]
    view: View,

    /// Sort by this column: publish, endpoint, port, open, new, in, out, fail, dial, network, ...
    #[arg(long, value_name = "COLUMN", default_value = "out", value_parser = order)]
    sort: Order,

    /// Reverse the order: the smallest first
    #[arg(long)]
    reverse: bool,

    /// Show only rows with this text in one of their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,

    /// Print one frame as text after one interval, and exit
    #[arg(long)]
    once: bool,

    /// Print the frame as JSON, unsorted and unfiltered
    #[arg(long, requires = "once")]
    json: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = timeout(text)?;
    let [shortest, longest] = INTERVALS;
    if interval < shortest || interval > longest {
        return Err("it must be between 100ms and 1h".to_owned());
    }
    Ok(interval)
}

fn order(text: &str) -> Result<Order, String> {
    Order::by(text)
        .ok_or_else(|| format!("unknown column; use one of {}", Order::keys().join(", ")))
}

impl Top {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        if !self.once && !io::stdout().is_terminal() {
            let line = "standard output is not a terminal; use --once to print one frame as text";
            return Err(UsageError(line.to_owned()).into());
        }
        let client = match &self.project {
            Some(project) => Client::of(checked(project)?)?,
            None => Client::new()?,
        };
        let runtime = event_loop()?;
        // Before the terminal is set up, so that an error is printed as plain text.
        let first = runtime.block_on(screen::fetch(&client))?;
        let order = Order { reversed: self.reverse, ..self.sort };
        if !self.once {
            let state = State::new(self.view, order, self.filter.clone(), self.interval, first);
            return screen::show(state, client);
        }
        let second = runtime.block_on(async {
            tokio::time::sleep(self.interval).await;
            screen::fetch(&client).await
        })?;
        let rates = Rates::between(Some(&first), &second);
        let text = if self.json {
            format!("{}\n", serde_json::to_string_pretty(&rates).context("JSON")?)
        } else {
            frame(&rates, order, &self.filter)
        };
        print(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_bounded_and_columns_are_checked() {
        assert_eq!(interval("1s"), Ok(Duration::from_secs(1)));
        for bad in ["0", "99ms", "2h", "fast", "-1s", ""] {
            assert!(interval(bad).is_err(), "{bad}");
        }
        assert_eq!(order("in").map(|order| order.key), Ok("in"));
        assert!(order("beauty").unwrap_err().contains("publish, endpoint, port"));
    }
}
