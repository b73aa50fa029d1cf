//! One frame as plain text.

use super::Rates;
use super::sheet::{Order, Sheet, View};
use super::summary::{Piece, lines, title};

/// Columns of a frame, enough for every name.
const WIDTH: usize = 1000;

/// All of the figures: the summary lines, and every view with rows.
pub(crate) fn frame(rates: &Rates, order: Order, filter: &str) -> String {
    let join = |pieces: &[Piece]| {
        pieces.iter().map(|piece| piece.text.as_str()).collect::<Vec<_>>().join("  ")
    };
    let mut text = format!("{}  rates over {:.1} s\n", join(&title(rates)), rates.over_seconds);
    for (name, pieces) in lines(rates) {
        text.push_str(&format!("{name:6}{}\n", join(&pieces)));
    }
    for view in View::ALL {
        let sheet = Sheet::new(view, rates, order, filter);
        if sheet.rows.is_empty() {
            continue;
        }
        let widths = sheet.widths(WIDTH);
        let mut line = |cells: Vec<String>| {
            text.push_str(cells.join("  ").trim_end());
            text.push('\n');
        };
        line(Vec::new());
        line(sheet.heads(&widths).map(|(head, _)| head).collect());
        for row in &sheet.rows {
            line(Sheet::cells(row, &widths).map(|(cell, _)| cell).collect());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::figures;
    use super::*;

    #[test]
    fn a_frame_contains_all_views() {
        let rates = Rates::between(Some(&figures(10_000, 100)), &figures(12_000, 200));
        let expected = "\
tidegate top: shop  up 12s  descriptors 30/1024  rates over 2.0 s
ports TCP open 3/100k  new 300/s  in 300 kB/s  out 15.0 MB/s  fail 15/s
NAT   flows 12/65.5k  new 50/s  in 100 kB/s  out 50.0 kB/s  drop 0/s  retx 50/s
names asked 400/s  unknown 100/s  fail 20/s  servers 1, silent 0

PUBLISHED         ENDPOINT  TO  OPEN  NEW/s    IN/s    OUT/s  FAIL/s     DIAL
0.0.0.0:53/udp    dns       80     3    150  150 kB  7.50 MB     5.0  0.20 ms
[::]:8080/tcp     web       80     2    100  100 kB  5.00 MB     5.0  0.20 ms
0.0.0.0:8080/tcp  web       80     1     50   50 kB  2.50 MB     5.0  0.20 ms

ENDPOINT  NETWORKS    PORTS  OPEN  NEW/s    IN/s    OUT/s  FAIL/s
web       front back      2     3    150  150 kB  7.50 MB      10
dns       front           1     3    150  150 kB  7.50 MB     5.0

NETWORK  ENDPOINTS  OPEN    IN/s    OUT/s  ASKED/s  UNKNOWN/s  FAIL/s
front            2     6  300 kB  15.0 MB      200         50      10
back             1     3  150 kB  7.50 MB      200         50      10

SERVER         TRUSTED  ASKED/s  SILENT/s  FAIL/s   ANSWER
192.0.2.53:53  yes           50         0       0  0.40 ms
";
        let expected = expected.replace("  50 kB  2.50", "  50.0 kB  2.50");
        let squeeze = |text: &str| {
            text.lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect::<Vec<_>>()
        };
        let text = frame(&rates, Order::default(), "");
        assert_eq!(squeeze(&text), squeeze(&expected), "{text}");
        // Columns are aligned.
        let at = |needle: &str| text.lines().find(|line| line.contains(needle)).unwrap().len();
        assert_eq!(at("PUBLISHED"), at("0.0.0.0:53/udp"));
        let filtered = frame(&rates, Order::default(), "udp");
        assert!(
            !filtered.contains("NETWORK ") && filtered.contains("0.0.0.0:53/udp"),
            "{filtered}"
        );
    }
}
