//! Tables of cells: the columns of each view, sorting, filtering, and fitting to a width.

use super::cell::Cell;
use super::rates::{Flow, Rates};

/// A view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum View {
    /// Published ports
    #[default]
    Ports,
    /// Endpoints, by their published ports
    Endpoints,
    /// Networks
    Networks,
    /// Upstream name servers
    Names,
}

impl View {
    /// All views, in the order of their tabs.
    pub(crate) const ALL: [Self; 4] = [Self::Ports, Self::Endpoints, Self::Networks, Self::Names];

    /// Returns the label of its tab.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Ports => "Ports",
            Self::Endpoints => "Endpoints",
            Self::Networks => "Networks",
            Self::Names => "Names",
        }
    }

    /// The view `steps` further on, wrapping around.
    pub(crate) fn step(self, steps: usize) -> Self {
        Self::ALL[(self as usize + steps) % Self::ALL.len()]
    }
}

/// A column: its heading, and the key to sort by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) head: &'static str,
    pub(crate) key: &'static str,
    /// Omitted if the table is too wide.
    optional: bool,
}

const fn column(head: &'static str, key: &'static str) -> Column {
    Column { head, key, optional: false }
}

const fn optional(head: &'static str, key: &'static str) -> Column {
    Column { head, key, optional: true }
}

const PORTS: &[Column] = &[
    column("PUBLISHED", "publish"),
    column("ENDPOINT", "endpoint"),
    column("TO", "port"),
    column("OPEN", "open"),
    column("NEW/s", "new"),
    column("IN/s", "in"),
    column("OUT/s", "out"),
    column("FAIL/s", "fail"),
    optional("DIAL", "dial"),
];
const ENDPOINTS: &[Column] = &[
    column("ENDPOINT", "endpoint"),
    column("NETWORKS", "network"),
    column("PORTS", "ports"),
    column("OPEN", "open"),
    column("NEW/s", "new"),
    column("IN/s", "in"),
    column("OUT/s", "out"),
    column("FAIL/s", "fail"),
];
const NETWORKS: &[Column] = &[
    column("NETWORK", "network"),
    column("ENDPOINTS", "endpoints"),
    column("OPEN", "open"),
    column("IN/s", "in"),
    column("OUT/s", "out"),
    column("ASKED/s", "asked"),
    column("UNKNOWN/s", "unknown"),
    column("FAIL/s", "fail"),
];
const NAMES: &[Column] = &[
    column("SERVER", "server"),
    column("TRUSTED", "trusted"),
    column("ASKED/s", "asked"),
    column("SILENT/s", "silent"),
    column("FAIL/s", "fail"),
    column("ANSWER", "time"),
];

impl View {
    /// Returns the columns of the view.
    pub(crate) const fn columns(self) -> &'static [Column] {
        match self {
            Self::Ports => PORTS,
            Self::Endpoints => ENDPOINTS,
            Self::Networks => NETWORKS,
            Self::Names => NAMES,
        }
    }
}

/// The column that rows are sorted by, and whether the order is reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) key: &'static str,
    pub(crate) reversed: bool,
}

impl Default for Order {
    fn default() -> Self {
        Self { key: "out", reversed: false }
    }
}

impl Order {
    /// Sorts by the column `key`, of any view.
    pub(crate) fn by(key: &str) -> Option<Self> {
        let mut all = View::ALL.iter().flat_map(|view| view.columns());
        all.find(|column| column.key == key).map(|column| Self { key: column.key, reversed: false })
    }

    /// All sort keys.
    pub(crate) fn keys() -> Vec<&'static str> {
        let mut keys = Vec::new();
        for column in View::ALL.iter().flat_map(|view| view.columns()) {
            if !keys.contains(&column.key) {
                keys.push(column.key);
            }
        }
        keys
    }
}

/// The table of a view.
#[derive(Clone, Debug)]
pub(crate) struct Sheet {
    pub(crate) columns: &'static [Column],
    pub(crate) rows: Vec<Vec<Cell>>,
}

impl Sheet {
    /// The table of `view` for `rates`: the rows with a name that contains `filter`, sorted by
    /// `order`. If the view has no such column, the rows keep their order.
    pub(crate) fn new(view: View, rates: &Rates, order: Order, filter: &str) -> Self {
        let mut rows = rows(view, rates);
        let filter = filter.to_lowercase();
        let found =
            |cell: &Cell| matches!(cell, Cell::Text(text) if text.to_lowercase().contains(&filter));
        rows.retain(|row| filter.is_empty() || row.iter().any(found));
        let columns = view.columns();
        if let Some(index) = columns.iter().position(|column| column.key == order.key) {
            rows.sort_by(|one, two| {
                let compared = one[index].compare(&two[index]);
                if order.reversed { compared.reverse() } else { compared }
            });
        }
        Self { columns, rows }
    }

    /// Returns the column widths for a table of at most `total` columns, with two blanks between; 0
    /// for an omitted column. Names are truncated before numbers.
    pub(crate) fn widths(&self, total: usize) -> Vec<usize> {
        let content = |index: usize, column: &Column| {
            let cells = self.rows.iter().map(|row| row[index].show().chars().count());
            cells.max().unwrap_or(0).max(column.head.len())
        };
        let mut widths: Vec<usize> =
            self.columns.iter().enumerate().map(|(index, column)| content(index, column)).collect();
        let sum = |widths: &[usize]| {
            let shown = widths.iter().filter(|width| **width > 0);
            shown.map(|width| width + 2).sum::<usize>().saturating_sub(2)
        };
        for (index, column) in self.columns.iter().enumerate().rev() {
            if column.optional && sum(&widths) > total {
                widths[index] = 0;
            }
        }
        // The widest name shrinks first, down to the width of its heading.
        while sum(&widths) > total {
            let is_name = |index: &usize| {
                let is_text = self.rows.first().is_none_or(|row| row[*index].is_text());
                is_text && widths[*index] > self.columns[*index].head.len()
            };
            let Some(widest) = (0..widths.len()).filter(is_name).max_by_key(|index| widths[*index])
            else {
                break;
            };
            widths[widest] -= 1;
        }
        widths
    }

    /// Returns the cells of a row, padded to the column widths: names left-aligned, numbers
    /// right-aligned.
    pub(crate) fn cells<'a>(
        row: &'a [Cell],
        widths: &'a [usize],
    ) -> impl Iterator<Item = (String, &'a Cell)> {
        let shown = row.iter().zip(widths).filter(|(_, width)| **width > 0);
        shown.map(|(cell, width)| (aligned(&cell.show(), *width, cell.is_text()), cell))
    }

    /// Returns the headings, padded likewise.
    pub(crate) fn heads<'a>(
        &'a self,
        widths: &'a [usize],
    ) -> impl Iterator<Item = (String, &'static Column)> + 'a {
        let is_text = |index: usize| self.rows.first().is_some_and(|row| row[index].is_text());
        let shown =
            self.columns.iter().zip(widths).enumerate().filter(|(_, (_, width))| **width > 0);
        shown.map(move |(index, (column, width))| {
            (aligned(column.head, *width, is_text(index)), column)
        })
    }
}

fn aligned(text: &str, width: usize, left: bool) -> String {
    let length = text.chars().count();
    if length > width {
        let kept: String = text.chars().take(width.saturating_sub(1)).collect();
        return format!("{kept}…");
    }
    if left { format!("{text:width$}") } else { format!("{text:>width$}") }
}

fn rows(view: View, rates: &Rates) -> Vec<Vec<Cell>> {
    let text = |text: &str| Cell::Text(text.to_owned());
    let flow = |flow: &Flow| {
        [
            Cell::Count(flow.open),
            Cell::Rate(flow.begun_rate),
            Cell::Bytes(flow.bytes_in_rate),
            Cell::Bytes(flow.bytes_out_rate),
            Cell::Errors(flow.failed_rate),
        ]
    };
    match view {
        View::Ports => {
            let row = |port: &super::rates::PortRates| {
                let mut row = vec![
                    text(&port.publish),
                    text(&port.endpoint),
                    text(&port.container_port.to_string()),
                ];
                row.extend(flow(&port.flow));
                row.push(Cell::Time(port.dial_seconds));
                row
            };
            rates.ports.iter().map(row).collect()
        }
        View::Endpoints => {
            let row = |endpoint: &super::rates::EndpointRates| {
                let networks = endpoint.networks.join(" ");
                let mut row =
                    vec![text(&endpoint.endpoint), text(&networks), Cell::Count(endpoint.ports)];
                row.extend(flow(&endpoint.flow));
                row
            };
            rates.endpoints.iter().map(row).collect()
        }
        View::Networks => {
            let row = |network: &super::rates::NetworkRates| {
                vec![
                    text(&network.network),
                    Cell::Count(network.endpoints),
                    Cell::Count(network.flow.open),
                    Cell::Bytes(network.flow.bytes_in_rate),
                    Cell::Bytes(network.flow.bytes_out_rate),
                    Cell::Rate(network.questions_rate),
                    Cell::Rate(network.questions_unknown_rate),
                    Cell::Errors(network.questions_failed_rate),
                ]
            };
            rates.networks.iter().map(row).collect()
        }
        View::Names => {
            let row = |upstream: &super::rates::UpstreamRates| {
                vec![
                    text(&upstream.server),
                    text(if upstream.trusted { "yes" } else { "no" }),
                    Cell::Rate(upstream.asked_rate),
                    Cell::Errors(upstream.silent_rate),
                    Cell::Errors(upstream.failed_rate),
                    Cell::Time(upstream.answer_seconds),
                ]
            };
            rates.upstreams.iter().map(row).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::figures;
    use super::*;

    fn rates() -> Rates {
        Rates::between(Some(&figures(10_000, 100)), &figures(12_000, 200))
    }

    fn names(sheet: &Sheet) -> Vec<String> {
        sheet.rows.iter().map(|row| row[0].show()).collect()
    }

    #[test]
    fn rows_sort_by_any_column_and_reversed() {
        let by = |key: &str, reversed| {
            let order = Order { reversed, ..Order::by(key).unwrap() };
            names(&Sheet::new(View::Ports, &rates(), order, ""))
        };
        assert_eq!(by("out", false), ["0.0.0.0:53/udp", "[::]:8080/tcp", "0.0.0.0:8080/tcp"]);
        assert_eq!(by("out", true), ["0.0.0.0:8080/tcp", "[::]:8080/tcp", "0.0.0.0:53/udp"]);
        assert_eq!(by("publish", false), ["0.0.0.0:53/udp", "0.0.0.0:8080/tcp", "[::]:8080/tcp"]);
        // Not a column of that view: rows stay in the order of publication.
        assert_eq!(by("asked", false), ["0.0.0.0:8080/tcp", "[::]:8080/tcp", "0.0.0.0:53/udp"]);
        assert_eq!(Order::by("beauty"), None);
        assert_eq!(Order::keys().len(), 18);
    }

    #[test]
    fn a_filter_matches_every_name_regardless_of_case() {
        let filtered =
            |filter: &str| names(&Sheet::new(View::Ports, &rates(), Order::default(), filter));
        assert_eq!(filtered("WEB").len(), 2);
        assert_eq!(filtered("udp"), ["0.0.0.0:53/udp"]);
        assert_eq!(filtered("nobody"), [""; 0]);
        assert_eq!(
            names(&Sheet::new(View::Endpoints, &rates(), Order::default(), "back")),
            ["web"]
        );
    }

    #[test]
    fn the_optional_column_is_omitted_first_then_the_widest_name_is_truncated() {
        let mut figures = figures(12_000, 200);
        figures.ports[0].publish = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535/tcp".into();
        figures.ports[0].endpoint = "an-endpoint-with-a-long-name".into();
        let rates = Rates::between(None, &figures);
        let sheet = Sheet::new(View::Ports, &rates, Order::default(), "");
        for total in [80, 100, 132, 300] {
            let widths = sheet.widths(total);
            assert!(
                widths.iter().filter(|width| **width > 0).map(|width| width + 2).sum::<usize>() - 2
                    <= total
            );
            assert_eq!(widths[8] > 0, total == 132 || total == 300, "{total}: {widths:?}");
            let row: Vec<String> =
                Sheet::cells(&sheet.rows[0], &widths).map(|(text, _)| text).collect();
            assert_eq!(row[0].contains('…'), total < 132, "{total}: {row:?}");
            // Numbers are not truncated.
            assert!(row[2..].iter().all(|cell| !cell.contains('…')), "{row:?}");
        }
    }
}
