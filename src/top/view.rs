//! Drawing on a terminal.

use super::sheet::{Sheet, View};
use super::state::State;
use super::summary::{Piece, fitting, lines, title};
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Wrap};

/// The minimum size of the terminal, in columns and lines.
pub(super) const MIN_SIZE: (u16, u16) = (80, 12);

/// Lines above and below the rows of the table.
const ABOVE: u16 = 6;
const BELOW: u16 = 1;

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const ERROR: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);

const HELP: &str = "q quit  Tab view  s/S sort  r reverse  / filter  arrows scroll";

/// Draws `state`.
pub(super) fn draw(frame: &mut Frame<'_>, state: &State) {
    let area = frame.area();
    if area.width < MIN_SIZE.0 || area.height < MIN_SIZE.1 {
        let text = too_small(area);
        return frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
    }
    let width = usize::from(area.width);
    let mut text = vec![first_line(state, width)];
    for (name, pieces) in lines(&state.rates) {
        let mut spans = vec![Span::styled(format!("{name:6}"), BOLD)];
        spans.extend(spans_of(fitting(&pieces, width - 6)));
        text.push(Line::from(spans));
    }
    text.push(tabs(state));
    let sheet = state.sheet();
    let room = usize::from(area.height - ABOVE - BELOW);
    table(state, &sheet, room, width, &mut text);
    frame.render_widget(Paragraph::new(text), Rect { height: area.height - BELOW, ..area });
    let bottom = Rect { y: area.y + area.height - BELOW, height: BELOW, ..area };
    frame.render_widget(Paragraph::new(last_line(state, sheet.rows.len(), room)), bottom);
}

fn too_small(area: Rect) -> String {
    let (columns, lines) = MIN_SIZE;
    format!(
        "tidegate top needs {columns} columns and {lines} lines, but this terminal has {} and {}: enlarge it, or use --once (q quits)",
        area.width, area.height
    )
}

fn first_line(state: &State, width: usize) -> Line<'static> {
    if let Some(reason) = &state.lost {
        let text: String =
            format!("connection lost, retrying: {reason}").chars().take(width).collect();
        return Line::styled(text, ERROR);
    }
    let mut pieces = title(&state.rates);
    let every = humantime::format_duration(state.interval);
    pieces.insert(2, Piece { text: format!("every {every}"), is_error: false });
    let mut spans = spans_of(fitting(&pieces, width));
    if let Some(first) = spans.first_mut() {
        first.style = BOLD;
    }
    Line::from(spans)
}

fn spans_of(pieces: &[Piece]) -> Vec<Span<'static>> {
    let mut spans = Vec::new();
    for piece in pieces {
        if !spans.is_empty() {
            spans.push(Span::raw("  "));
        }
        let style = if piece.is_error { ERROR } else { Style::new() };
        spans.push(Span::styled(piece.text.clone(), style));
    }
    spans
}

/// `[Ports 8]  Endpoints 2  Networks 1  Names 1   filter: web`.
fn tabs(state: &State) -> Line<'static> {
    let mut spans = Vec::new();
    for (view, size) in View::ALL.into_iter().zip(state.sizes()) {
        let chosen = view == state.view;
        let text = format!("{} {size}", view.title());
        spans.push(if chosen {
            Span::styled(format!("[{text}]"), BOLD)
        } else {
            Span::raw(format!(" {text} "))
        });
        spans.push(Span::raw(" "));
    }
    if !state.filter.is_empty() {
        spans.push(Span::raw(format!(" filter: {}", state.filter)));
    }
    Line::from(spans)
}

/// The headings of the table, and the rows that fit.
fn table(state: &State, sheet: &Sheet, room: usize, width: usize, text: &mut Vec<Line<'static>>) {
    let widths = sheet.widths(width);
    let mut heads = Vec::new();
    for (head, column) in sheet.heads(&widths) {
        let sorted = column.key == state.order.key;
        let style = if sorted { BOLD.add_modifier(Modifier::UNDERLINED) } else { DIM };
        heads.extend([Span::styled(head, style), Span::raw("  ")]);
    }
    text.push(Line::from(heads));
    if sheet.rows.is_empty() {
        let why = if state.filter.is_empty() { "no entries" } else { "no name matches the filter" };
        text.push(Line::styled(why, DIM));
    }
    for row in sheet.rows.iter().skip(state.scroll).take(room) {
        let mut spans = Vec::new();
        for (shown, cell) in Sheet::cells(row, &widths) {
            let style = match () {
                // Stale figures are dim.
                () if state.lost.is_some() => DIM,
                () if cell.is_error() => ERROR,
                () => Style::new(),
            };
            spans.extend([Span::styled(shown, style), Span::raw("  ")]);
        }
        text.push(Line::from(spans));
    }
}

fn last_line(state: &State, rows: usize, room: usize) -> Line<'static> {
    if state.typing {
        return Line::from(vec![
            Span::styled("filter: ", BOLD),
            Span::raw(state.filter.clone()),
            Span::styled("_", Style::new().add_modifier(Modifier::SLOW_BLINK)),
            Span::styled("   Enter keeps it, Esc removes it", DIM),
        ]);
    }
    let more = if rows > room {
        let last = (state.scroll + room).min(rows);
        format!("  {}-{last} of {rows}", state.scroll + 1)
    } else {
        String::new()
    };
    Line::from(vec![Span::styled(HELP, DIM), Span::raw(more)])
}

#[cfg(test)]
mod tests {
    use super::super::rates::tests::figures;
    use super::super::sheet::Order;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use std::time::Duration;

    fn state() -> State {
        let first = figures(10_000, 100);
        let mut state =
            State::new(View::Ports, Order::default(), String::new(), Duration::from_secs(2), first);
        state.take(Ok(figures(12_000, 200)));
        state
    }

    /// Returns the screen of a terminal of that size, line by line, without trailing blanks.
    fn shown(state: &State, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| {
            (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned()
        };
        (0..height).map(line).collect()
    }

    #[test]
    fn eighty_columns_and_twenty_four_lines_show_everything() {
        let lines = shown(&state(), 80, 24);
        assert_eq!(
            lines[..9],
            [
                "tidegate top: shop  up 12s  every 2s  descriptors 30/1024",
                "ports TCP open 3/100k  new 300/s  in 300 kB/s  out 15.0 MB/s  fail 15/s",
                "NAT   flows 12/65.5k  new 50/s  in 100 kB/s  out 50.0 kB/s  drop 0/s  retx 50/s",
                "names asked 400/s  unknown 100/s  fail 20/s  servers 1, silent 0",
                "[Ports 3]  Endpoints 2   Networks 2   Names 1",
                "PUBLISHED         ENDPOINT  TO  OPEN  NEW/s     IN/s    OUT/s  FAIL/s     DIAL",
                "0.0.0.0:53/udp    dns       80     3    150   150 kB  7.50 MB     5.0  0.20 ms",
                "[::]:8080/tcp     web       80     2    100   100 kB  5.00 MB     5.0  0.20 ms",
                "0.0.0.0:8080/tcp  web       80     1     50  50.0 kB  2.50 MB     5.0  0.20 ms",
            ]
        );
        assert_eq!(lines[23], HELP);
    }

    #[test]
    fn rates_are_unknown_before_the_second_sample() {
        let first = figures(10_000, 100);
        let state =
            State::new(View::Ports, Order::default(), String::new(), Duration::from_secs(2), first);
        let lines = shown(&state, 80, 24);
        assert!(lines[1].contains("new -/s  in -/s"), "{lines:?}");
        assert!(lines[6].contains(" -  "), "{lines:?}");
    }

    #[test]
    fn a_terminal_of_any_size_below_the_minimum_shows_an_error() {
        for (width, height) in [(79, 24), (80, 11), (40, 5), (1, 1), (200, 3)] {
            let lines = shown(&state(), width, height);
            assert!(lines[0].starts_with('t'), "{width}x{height}: {lines:?}");
        }
        let lines = shown(&state(), 79, 24);
        let expected =
            "tidegate top needs 80 columns and 12 lines, but this terminal has 79 and 24:";
        assert!(lines[0].starts_with(expected), "{lines:?}");
        assert!(lines[1].contains("--once"), "{lines:?}");
    }

    #[test]
    fn after_a_lost_connection_the_last_figures_stay_below_the_reason() {
        let mut state = state();
        state.take(Err("socket /run/tidegate/api.sock: connection refused".into()));
        let lines = shown(&state, 80, 24);
        assert_eq!(
            lines[0],
            "connection lost, retrying: socket /run/tidegate/api.sock: connection refused"
        );
        assert!(lines[6].contains("7.50 MB"), "{lines:?}");
        state.take(Ok(figures(14_000, 200)));
        assert!(shown(&state, 80, 24)[0].starts_with("tidegate top: shop"));
    }

    #[test]
    fn rows_beyond_the_terminal_are_scrolled_and_counted() {
        let mut figures = figures(12_000, 200);
        let one = figures.ports[0].clone();
        figures.ports = (0..500)
            .map(|id| {
                let publish = format!("0.0.0.0:{}/tcp", 1000 + id);
                tidegate_api::types::PortFigures { id, publish, ..one.clone() }
            })
            .collect();
        let mut state = State::new(
            View::Ports,
            Order::by("publish").unwrap(),
            String::new(),
            Duration::from_secs(2),
            figures,
        );
        let lines = shown(&state, 80, 24);
        assert!(
            lines[6].starts_with("0.0.0.0:1000/tcp") && lines[23].ends_with("  1-17 of 500"),
            "{lines:?}"
        );
        state.scroll = 490;
        let lines = shown(&state, 80, 24);
        assert!(
            lines[6].starts_with("0.0.0.0:1490/tcp") && lines[23].ends_with("  491-500 of 500"),
            "{lines:?}"
        );
    }

    #[test]
    fn the_filter_is_shown_while_typed_and_when_nothing_matches() {
        let mut state = state();
        state.filter = "nobody".into();
        state.typing = true;
        let lines = shown(&state, 80, 24);
        assert!(
            lines[4].ends_with("filter: nobody") && lines[23].starts_with("filter: nobody_"),
            "{lines:?}"
        );
        assert_eq!(lines[6], "no name matches the filter");
    }
}
